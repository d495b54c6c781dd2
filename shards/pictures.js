// Galleries: pictures of one prompt by several sets, side by side. A gallery's controls choose how they
// lie (side by side, two in one frame with a slider, or one set alone, all in the same place) and the order
// of prompts; the key b blinks. A picture opens large: left and right go through the sets, up and down
// through the prompts, Escape closes.
(() => {
  const make = (tag, parent, values = {}) =>
    Object.assign(parent.appendChild(document.createElement(tag)), values);

  const prompt = figure => figure.querySelector('figcaption').textContent.trim();

  // Two pictures of a row in one frame: the left one is cut off at the slider.
  const slide = (parent, buttons, pair, value, prompt) => {
    const box = make('div', parent, { className: 'slide' }), frame = make('div', box, { className: 'frame' });
    for (const i of [...pair].reverse()) {
      const { src, alt, width, height } = buttons[i].querySelector('img');
      make('img', frame, { src, alt, width, height });
    }
    const [left, right] = pair.map(i => buttons[i].dataset.name);
    const range = make('input', frame, { type: 'range', min: 0, max: 100, value });
    range.setAttribute('aria-label', `Slider between ${left} and ${right}: ${prompt}`);
    range.oninput = () => {
      frame.style.setProperty('--x', `${range.value}%`);
      range.setAttribute('aria-valuetext', `${range.value} % of ${left}, the rest of ${right}`);
    };
    range.oninput();
    const ends = make('div', box, { className: 'ends' });
    make('span', ends, { textContent: left });
    make('span', ends, { textContent: right });
    return { box, range, ends };
  };

  class Gallery {
    constructor(root) {
      this.root = root;
      this.frame = root.querySelector('.pictures');
      this.scroller = root.querySelector('.wide');
      this.figures = [...root.querySelectorAll('figure')].filter(figure => this.buttons(figure).length);
      this.radios = [...root.querySelectorAll('.controls [type=radio]')];
      this.selects = [...root.querySelectorAll('.pair select')];
      this.view = 'side'; // or 'slider', or the number of a set
      this.position = 50; // of the sliders, in percent
      root.querySelector('.controls')?.removeAttribute('hidden');
      this.radios.forEach(radio => { radio.onchange = () => this.show(radio.value); });
      this.selects.forEach(select => { select.onchange = () => this.show('slider'); });
      const order = root.querySelector('.order');
      if (order) order.onchange = () => this.sort(order.selectedIndex);
      this.figures.forEach(figure => this.buttons(figure).forEach((button, i) => {
        button.onclick = () => large.open(this, this.figures.indexOf(figure), i);
      }));
    }
    buttons(figure) { return [...figure.querySelectorAll('.row button')]; }
    get sets() { return this.radios.length - 2; } // that a view may be of; below 1 without controls
    get pair() { return this.selects.map(select => select.selectedIndex); }

    show(view) {
      this.view = view === 'side' || view === 'slider' ? view : Number(view);
      this.radios.forEach(radio => { radio.checked = radio.value === `${view}`; });
      const side = this.view === 'side', slider = this.view === 'slider';
      this.root.dataset.view = side || slider ? view : 'place';
      this.root.classList.toggle('single', !side); // a picture a prompt
      if (this.scroller) {
        this.frame.classList.toggle('aligned', side);
        this.scroller.classList.toggle('wide', side);
      }
      this.root.querySelector('.pair')?.toggleAttribute('hidden', !slider || this.sets < 3);
      this.root.querySelectorAll('.slide').forEach(box => box.remove());
      this.figures.forEach((figure, row) => {
        const cells = [...figure.querySelector('.row').children];
        cells.forEach((cell, i) => cell.classList.toggle('off', !side && (slider || i !== this.view)));
        if (!slider) return;
        const { box, range, ends } = slide(figure, this.buttons(figure), this.pair, this.position, prompt(figure));
        figure.prepend(box);
        const open = () => large.open(this, this.figures.indexOf(figure), this.pair[0]);
        range.onkeydown = event => { if (event.key === 'Enter') open(); };
        ends.firstChild.after(make('button', ends, { type: 'button', textContent: 'large', onclick: open }));
      });
    }

    // The next set in the place of this one; of a slider, the other of its two.
    blink() {
      if (this.sets < 2) return;
      const figure = this.figures.find(figure => figure.getBoundingClientRect().bottom > 0);
      const before = figure?.getBoundingClientRect().top;
      if (this.view === 'slider') {
        this.position = this.position === 100 ? 0 : 100;
        this.root.querySelectorAll('.slide [type=range]').forEach(range => { range.value = this.position; range.oninput(); });
      } else {
        this.show(this.view === 'side' ? 0 : (this.view + 1) % this.sets);
      }
      if (figure) scrollBy(0, figure.getBoundingClientRect().top - before);
    }

    sort(order) {
      const rank = figure => Number(figure.dataset.ranks.split(' ')[order]);
      this.figures.sort((a, b) => rank(a) - rank(b));
      this.frame.append(...this.figures);
    }
  }

  const large = {
    build() {
      this.dialog = make('dialog', document.body);
      this.dialog.setAttribute('aria-label', 'Picture, large');
      const bar = make('div', this.dialog, { className: 'bar' });
      this.title = make('span', bar);
      this.views = ['side by side', 'slider', 'blink (b)'].map(textContent => make('button', bar, { type: 'button', textContent }));
      const [side, slider, blink] = this.views;
      side.onclick = () => { this.gallery.show('side'); this.show(); };
      slider.onclick = () => { this.gallery.show('slider'); this.show(); };
      blink.onclick = () => this.blink();
      this.close = make('button', bar, { type: 'button', textContent: 'Close', onclick: () => this.dialog.close() });
      this.content = make('div', this.dialog, { className: 'large' });
      this.dialog.onclick = event => { if (event.target === this.dialog) this.dialog.close(); };
      this.dialog.onclose = () => {
        const figure = this.gallery.figures[this.row];
        (figure.querySelector('[type=range]') ?? this.gallery.buttons(figure)[this.column]).focus();
      };
      this.dialog.onkeydown = event => this.step(event);
    },

    open(gallery, row, column) {
      if (!this.dialog) this.build();
      Object.assign(this, { gallery, row, column });
      this.views.forEach(button => { button.hidden = gallery.sets < 2; });
      this.show();
      if (!this.dialog.open) this.dialog.showModal();
      (this.content.querySelector('[type=range]') ?? this.close).focus();
    },

    show() {
      const { gallery, row } = this, figure = gallery.figures[row], buttons = gallery.buttons(figure);
      const pressed = [gallery.view === 'side', gallery.view === 'slider'];
      pressed.forEach((value, i) => this.views[i].setAttribute('aria-pressed', value));
      this.title.textContent = `${row + 1} of ${gallery.figures.length}: ${prompt(figure)}`;
      const focused = document.activeElement?.matches('.large [type=range]');
      this.content.replaceChildren();
      if (gallery.view === 'slider') {
        const { range } = slide(this.content, buttons, gallery.pair, gallery.position, prompt(figure));
        if (focused) range.focus();
        return;
      }
      // the chosen set beside the first, or beside the second where the first is chosen
      const other = this.column ? 0 : Math.min(1, buttons.length - 1);
      const shown = gallery.view === 'side' ? [other, this.column].sort((a, b) => a - b) : [this.column];
      for (const i of new Set(shown)) {
        const part = make('figure', this.content), { src, alt } = buttons[i].querySelector('img');
        const image = make('img', part, { src, alt }), { name, full } = buttons[i].dataset;
        const size = full ? `, made smaller for this page: ${image.naturalWidth} x ${image.naturalHeight} of ${full} pixels` : '';
        make('figcaption', part, { textContent: name + size });
        if (i === this.column) part.className = 'current';
      }
    },

    blink() {
      this.gallery.blink();
      if (typeof this.gallery.view === 'number') this.column = this.gallery.view;
      this.show();
    },

    step(event) {
      const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [0, 0];
      if (!down && (!right || this.gallery.view === 'slider')) return; // which moves the slider
      event.preventDefault();
      const { figures, view } = this.gallery;
      this.row = (this.row + down + figures.length) % figures.length;
      const sets = this.gallery.buttons(figures[this.row]).length;
      this.column = (Math.min(this.column, sets - 1) + right + sets) % sets;
      if (right && view !== 'side') this.gallery.show(this.column);
      this.show();
    },
  };

  const galleries = [...document.querySelectorAll('.gallery')].map(root => new Gallery(root));
  const inSight = ({ root }) => {
    const { top, bottom } = root.getBoundingClientRect();
    return top < innerHeight && bottom > 0;
  };
  addEventListener('keydown', event => {
    // a held key would flicker; in a list and a line of text it is a letter
    if (event.key !== 'b' || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches?.('select, textarea, input:not([type=radio], [type=range], [type=checkbox])')) return;
    if (large.dialog?.open) large.blink();
    else (galleries.find(({ root }) => root.contains(event.target)) ?? galleries.find(inSight))?.blink();
  });
  addEventListener('beforeprint', () => galleries.forEach(gallery => { if (gallery.view !== 'side') gallery.show('side'); }));
})();
