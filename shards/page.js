// Folded parts open for printing.
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
