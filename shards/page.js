// Folded parts open for printing.
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));

// Texts with a button `data-copy` are copied; each chart is saved as an SVG file of its own: with the
// styles of this page in light colours, and its caption and the names of its colours above it.
(() => {
  const styles = ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-family', 'font-size', 'font-weight'];
  const LINE = 18, SVG = document.querySelector('svg')?.namespaceURI;
  for (const button of document.querySelectorAll('[data-copy]')) {
    const source = document.getElementById(button.dataset.copy), status = button.parentNode.querySelector('[role=status]');
    button.parentNode.hidden = false;
    button.onclick = async () => {
      let copied = true;
      try {
        await navigator.clipboard.writeText(source.textContent);
      } catch { // no permission, or a page of a server without TLS: copy what is selected
        if (source.closest('details')) source.closest('details').open = true;
        getSelection().selectAllChildren(source);
        copied = document.execCommand('copy');
      }
      status.textContent = copied ? 'Copied' : 'It is selected: copy it with Ctrl+C';
    };
  }
  const text = (parent, x, y, words, weight, most = Infinity) => {
    const element = parent.appendChild(document.createElementNS(SVG, 'text'));
    Object.entries({ x, y, style: `font-weight: ${weight}` }).forEach(([name, value]) => element.setAttribute(name, value));
    element.textContent = words;
    const size = element.getComputedTextLength();
    if (size > most) element.setAttribute('style', `font-weight: ${weight}; font-size: ${12 * most / size}px`);
    return size;
  };
  const file = svg => {
    const copy = svg.cloneNode(true), light = document.body.appendChild(document.createElement('figure'));
    light.className = `light ${svg.closest('figure')?.className ?? ''}`;
    light.append(copy);
    const { width, height } = svg.viewBox.baseVal;
    const names = [...svg.closest('figure')?.querySelectorAll('figcaption .name') ?? []];
    text(copy, 8, -6, svg.getAttribute('aria-label'), 600, width - 16);
    let x = 8, y = height + LINE;
    for (const name of names) {
      const group = copy.appendChild(document.createElementNS(SVG, 'g'));
      const dot = group.appendChild(document.createElementNS(SVG, 'circle'));
      const size = text(group, 12, 4, name.textContent, 400) + 28;
      if (x > 8 && x + size > width) [x, y] = [8, y + LINE];
      Object.entries({ cx: 4, cy: 0, r: 4 }).forEach(([key, value]) => dot.setAttribute(key, value));
      group.setAttribute('style', `color: ${name.querySelector('.chip').style.background}`);
      group.setAttribute('transform', `translate(${x} ${y - 4})`);
      x += size;
    }
    const all = [copy, ...copy.querySelectorAll('*')];
    const values = all.map(element => { const style = getComputedStyle(element); return styles.map(name => style.getPropertyValue(name)); });
    all.forEach((element, i) => {
      ['class', 'style'].forEach(name => element.removeAttribute(name));
      styles.forEach((name, j) => element.setAttribute(name, values[i][j]));
    });
    const bottom = names.length ? y + 8 : height, box = [0, -LINE - 6, width, bottom + LINE + 6];
    Object.entries({ viewBox: box.join(' '), width: box[2], height: box[3] })
      .forEach(([name, value]) => copy.setAttribute(name, value));
    light.remove();
    return new XMLSerializer().serializeToString(copy);
  };
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const title = svg.getAttribute('aria-label'), button = document.createElement('button');
    Object.assign(button, { type: 'button', className: 'save screen', textContent: 'SVG' });
    button.setAttribute('aria-label', `Save ${title} as an SVG file`);
    button.onclick = () => {
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([file(svg)], { type: 'image/svg+xml' }));
      link.download = `${title.replace(/[^\p{L}\p{N}.-]+/gu, '-').slice(0, 80)}.svg`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    };
    svg.after(button);
  }
})();
