// A picture of a gallery opens large beside the other sets' picture of its prompt. Left and right go
// through the sets, up and down through the prompts, Escape closes. Folded parts open for printing.
(() => {
  const rows = [...document.querySelectorAll('.pictures figure')].map(figure => ({
    prompt: figure.querySelector('figcaption').textContent.trim(),
    buttons: [...figure.querySelectorAll('button')],
  }));
  let dialog, row = 0, column = 0;
  const make = (tag, parent, text = '') => {
    const element = parent.appendChild(document.createElement(tag));
    element.textContent = text;
    return element;
  };
  const show = () => {
    dialog.replaceChildren();
    const bar = make('div', dialog);
    bar.className = 'bar';
    make('span', bar, `${row + 1} of ${rows.length}: ${rows[row].prompt}`);
    const close = make('button', bar, 'Close');
    close.onclick = () => dialog.close();
    const large = make('div', dialog);
    large.className = 'large';
    // the chosen set beside the first, or beside the second where the first is chosen
    const { buttons } = rows[row];
    const other = column ? 0 : Math.min(1, buttons.length - 1);
    for (const i of [...new Set([other, column])].sort((a, b) => a - b)) {
      const figure = make('figure', large), image = make('img', figure);
      image.src = buttons[i].querySelector('img').src;
      image.alt = buttons[i].querySelector('img').alt;
      const { name, full } = buttons[i].dataset;
      const size = full ? `, made smaller for this page: ${image.naturalWidth} x ${image.naturalHeight} of ${full} pixels` : '';
      make('figcaption', figure, name + size);
      if (i === column) figure.className = 'current';
    }
    close.focus();
  };
  const open = (i, j) => {
    [row, column] = [i, j];
    if (!dialog) {
      dialog = make('dialog', document.body);
      dialog.setAttribute('aria-label', 'Picture, large');
      dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
      dialog.onclose = () => rows[row].buttons[column].focus();
      dialog.onkeydown = event => {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!step) return;
        event.preventDefault();
        row = (row + step[0] + rows.length) % rows.length;
        const count = rows[row].buttons.length;
        column = (Math.min(column, count - 1) + step[1] + count) % count;
        show();
      };
    }
    show();
    if (!dialog.open) dialog.showModal();
  };
  rows.forEach(({ buttons }, i) => buttons.forEach((button, j) => { button.onclick = () => open(i, j); }));
  addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
})();
