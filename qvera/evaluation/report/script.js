// Tooltips, as text only (textContent). Charts over the same x axis point at the same place together.
// The page of a running run gets new charts while it is open, so events are caught at the document.
(() => {
  const states = new WeakMap();
  const chartOf = box => {
    const state = states.get(box) ?? {box, tips: null, index: -1};
    if (state.tips !== box.dataset.tips) state.data = JSON.parse(state.tips = box.dataset.tips);
    states.set(box, state);
    return state;
  };
  const nearest = (list, value) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle; else high = middle;
    }
    return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
  };
  const show = (chart, index) => {
    chart.index = index;
    const at = chart.data.at[index], lines = chart.data.text[index];
    const [tip, rule] = ['.tip', '.rule'].map(name => chart.box.querySelector(name));
    for (const side of ['x1', 'x2']) rule.setAttribute(side, 100 * at + '%');
    rule.style.visibility = 'visible';
    tip.replaceChildren(...lines.map((line, i) => {
      const part = document.createElement(i ? 'div' : 'b');
      part.textContent = line;
      return part;
    }));
    tip.style.left = at < 0.5 ? `calc(${100 * at}% + 8px)` : 'auto';
    tip.style.right = at < 0.5 ? 'auto' : `calc(${100 * (1 - at)}% + 8px)`;
    tip.hidden = false;
  };
  const hide = chart => {
    chart.index = -1;
    chart.box.querySelector('.tip').hidden = true;
    chart.box.querySelector('.rule').style.visibility = 'hidden';
  };
  const peers = chart => [...document.querySelectorAll('.plot')].map(chartOf).filter(
    other => other.data.at.length && (other === chart || (other.box.dataset.sync && other.box.dataset.sync === chart.box.dataset.sync))
  );
  const point = (chart, index) => {
    const x = chart.data.x[index];
    for (const peer of peers(chart)) show(peer, peer === chart ? index : nearest(peer.data.x, x));
  };
  const on = (kind, act) => document.addEventListener(kind, event => {
    const box = event.target.closest?.('.plot');
    const chart = box && chartOf(box);
    if (chart && chart.data.at.length) act(chart, event);
  }, true);
  const leave = chart => peers(chart).forEach(hide);
  on('pointermove', (chart, event) => {
    const frame = chart.box.getBoundingClientRect();
    point(chart, nearest(chart.data.at, (event.clientX - frame.left) / frame.width));
  });
  for (const kind of ['pointerleave', 'blur']) on(kind, (chart, event) => { if (event.target === chart.box) leave(chart); });
  on('keydown', (chart, event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === 'Escape') leave(chart);
    if (!move) return;
    event.preventDefault();
    const start = chart.index < 0 ? (move > 0 ? -1 : chart.data.at.length) : chart.index;
    point(chart, Math.min(Math.max(start + move, 0), chart.data.at.length - 1));
  });
  const tidy = () => {  // titles are for browsers without scripts
    for (const title of document.querySelectorAll('.plot title')) title.remove();
  };
  // A chart that was drawn again points where it pointed.
  document.addEventListener('redrawn', () => {
    tidy();
    for (const chart of [...document.querySelectorAll('.plot')].map(chartOf)) {
      if (chart.index >= 0) show(chart, Math.min(chart.index, chart.data.at.length - 1));
    }
  });
  // Tables of many rows: sorted by the title that is clicked, filtered by name, and the first 200 shown.
  for (const table of document.querySelectorAll('table.many:not(.served)')) {
    const body = table.tBodies[0], controls = table.closest('section').querySelector('.controls');
    const [text, flagged] = controls.querySelectorAll('input'), shown = controls.querySelector('.shown');
    const all = controls.querySelector('button'), titles = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const rows = [...body.rows].map(row => ({row, name: row.cells[0].textContent.toLowerCase()}));
    let most = 200;
    const show = () => {
      const wanted = text.value.trim().toLowerCase();
      let found = 0;
      for (const {row, name} of rows) {
        const fits = name.includes(wanted) && (!flagged.checked || row.className === 'flagged');
        found += fits;
        row.hidden = !fits || found > most;
      }
      const count = number => number.toLocaleString('en');
      shown.textContent = `${count(Math.min(found, most))} of ${count(found)}`;
      all.hidden = found <= most;
    };
    controls.addEventListener('input', show);
    all.addEventListener('click', () => { most = Infinity; show(); });
    controls.hidden = false;
    show();
    const { compare } = new Intl.Collator('en', {numeric: true});
    titles.forEach((title, column) => {
      const button = document.createElement('button'), words = column === 0 || column === titles.length - 1;
      button.type = 'button';
      button.append(...title.childNodes);
      title.append(button);
      button.addEventListener('click', () => {
        const sign = title.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
        for (const other of titles) other.removeAttribute('aria-sort');
        title.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
        for (const one of rows) {
          const value = one.row.cells[column].textContent;
          one.key = words ? value : parseFloat(value.replaceAll(',', ''));
        }
        rows.sort(({key: a}, {key: b}) => words
          ? sign * compare(a, b)
          : Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0);  // a dash is last, whatever the order
        show();
        for (const {row} of rows) body.append(row);
      });
    });
  }
  tidy();
  addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
  document.documentElement.classList.add('js');
})();
