"""The page's style and its one small script. Kept in Python so that the page needs no file but itself."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --ink: #1a1d20; --soft: #555d66; --line: #dfe2e1; --faint: #a3abb0;
  --accent: #00696f; --wash: #e3f0ef; --tip: #1a1d20; --tip-ink: #fcfcfb;
  --p1: #c9cfd2; --p2: #8a949b; --p3: #00696f; --p4: #d08a2e; --p5: #a34b6b; --p6: #4c63b6; --p7: #6b8f3a;
  --c1: #00696f; --c2: #c9711a; --c3: #4c63b6; --c4: #a8325e; --c5: #5f8527; --c6: #7d4fa3; --c7: #2b92c4; --c8: #6a5a4a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e7e9ea; --soft: #a1a9b1; --line: #2e3439; --faint: #6a737b;
    --accent: #5cc7c0; --wash: #193734; --tip: #e7e9ea; --tip-ink: #14171a;
    --p1: #3c444a; --p2: #6a737b; --p3: #5cc7c0; --p4: #e0a458; --p5: #d07a98; --p6: #8fa3e8; --p7: #a5c76f;
    --c1: #5cc7c0; --c2: #eb9c4d; --c3: #8fa3e8; --c4: #e37ba0; --c5: #a5c76f; --c6: #bd97de; --c7: #6cbfe8; --c8: #bda892;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 3rem 2rem 4rem; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.25rem; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0.35rem 0 0.4rem;
     overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; font-weight: 650; margin: 0 0 0.9rem; }
h3 { font-size: 0.9rem; font-weight: 600; margin: 0; }
p { margin: 0 0 0.6rem; }
.soft, .eyebrow, .caption { color: var(--soft); }
.eyebrow { font-size: 0.875rem; margin: 0; }
.caption { font-size: 0.82rem; margin: 0; }
.eyebrow b { color: var(--ink); font-weight: 600; }
.notice { border-left: 3px solid var(--accent); padding: 0.1rem 0 0.1rem 0.9rem; margin: 1.25rem 0 0;
          max-width: 44rem; }
.notice p { margin: 0.25rem 0; }
.num, td, dd, .tick, .score { font-variant-numeric: tabular-nums; }
.outcome { display: grid; grid-template-columns: minmax(0, 1.2fr) minmax(0, 1fr); gap: 1.5rem 3rem; align-items: end;
           margin-top: 2rem; }
.score { font-size: 2.9rem; line-height: 1.1; letter-spacing: -0.025em; margin: 0.2rem 0 0; font-weight: 650; }
.score .from { color: var(--soft); font-weight: 400; }
.score .arrow { color: var(--faint); font-weight: 400; padding: 0 0.15em; }
.score .to { color: var(--accent); white-space: nowrap; }
.score .from { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: right; padding: 0.32rem 0 0.32rem 0.75rem; border-bottom: 1px solid var(--line);
         font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-size: 0.82rem; }
tr:last-child > * { border-bottom: 0; }
.scroll { overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 1.25rem 1.5rem; margin: 0; }
.tiles dt { font-size: 0.82rem; color: var(--soft); }
.tiles dd { margin: 0; }
.tiles .num { font-size: 1.35rem; line-height: 1.35; font-weight: 600; letter-spacing: -0.01em; display: block;
              white-space: nowrap; }
.tiles small { font-size: 0.8rem; line-height: 1.35; color: var(--soft); display: block; }
figure { margin: 0; min-width: 0; padding-bottom: 2rem; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: baseline; margin-bottom: 0.3rem; }
.legend { font-size: 0.8rem; color: var(--soft); white-space: nowrap; }
.legend i { display: inline-block; width: 1.4em; height: 0; border-top: 2px solid var(--ink); vertical-align: 0.25em;
            margin-right: 0.4em; }
.legend i.faint { border-color: var(--faint); border-top-width: 1px; }
.legend i.held-out { width: 8px; height: 8px; border: 0; border-radius: 50%; background: var(--accent);
                     vertical-align: 0; }
.legend i.dashed { border-top: 1.5px dashed var(--soft); }
.legend i.best { width: 11px; height: 11px; border: 1.5px solid var(--accent); border-radius: 50%;
                 vertical-align: -1px; }
.grid2 { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.9rem 2.5rem; margin-top: 1.25rem; }
.plot { position: relative; margin: 0.5rem 0.5rem 0 3.4rem; outline-offset: 6px; border-radius: 2px; }
.plot:focus-visible { outline: 2px solid var(--accent); }
.axes { display: block; overflow: visible; }
.axes svg { overflow: hidden; }
.tick { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; shape-rendering: crispEdges; }
.axes path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke: var(--ink);
             stroke-width: 1.75; }
.axes path.faint { stroke: var(--faint); stroke-width: 1; }
.axes path.held-out { stroke: var(--accent); stroke-width: 1.5; }
.axes path.dashed { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 3; }
.dot { fill: var(--ink); } .dot.faint, .dot.dashed { fill: var(--soft); }
.dot.held-out { fill: var(--accent); stroke: var(--page); stroke-width: 1.5; }
.ring { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.axes .best { stroke: var(--accent); stroke-width: 1; stroke-dasharray: 2 3; }
.bar { fill: var(--faint); stroke: var(--page); stroke-width: 1; }
.part { stroke: var(--page); stroke-width: 1; }
.p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); } .p4 { fill: var(--p4); } .p5 {
fill: var(--p5); } .p6 { fill: var(--p6); } .p7 { fill: var(--p7); }
.legend i.part { width: 10px; height: 10px; border: 0; vertical-align: -1px; }
.legend i.p1 { background: var(--p1); } .legend i.p2 { background: var(--p2); } .legend i.p3 { background:
var(--p3); } .legend i.p4 { background: var(--p4); } .legend i.p5 { background: var(--p5); } .legend i.p6 {
background: var(--p6); } .legend i.p7 { background: var(--p7); }
.axes path.c1 { stroke: var(--c1); } .axes path.c2 { stroke: var(--c2); } .axes path.c3 { stroke: var(--c3); }
.axes path.c4 { stroke: var(--c4); } .axes path.c5 { stroke: var(--c5); } .axes path.c6 { stroke: var(--c6); }
.axes path.c7 { stroke: var(--c7); } .axes path.c8 { stroke: var(--c8); }
.dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); } .dot.c4 { fill: var(--c4); }
.dot.c5 { fill: var(--c5); } .dot.c6 { fill: var(--c6); } .dot.c7 { fill: var(--c7); } .dot.c8 { fill: var(--c8); }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 0.5em; }
.legend i.swatch { width: 10px; height: 10px; border: 0; vertical-align: -1px; }
.swatch.c1 { background: var(--c1); } .swatch.c2 { background: var(--c2); } .swatch.c3 { background: var(--c3); }
.swatch.c4 { background: var(--c4); } .swatch.c5 { background: var(--c5); } .swatch.c6 { background: var(--c6); }
.swatch.c7 { background: var(--c7); } .swatch.c8 { background: var(--c8); }
.keys { display: flex; flex-wrap: wrap; gap: 0.2rem 1.25rem; }
table + .caption { margin-top: 0.9rem; }
code { font: 0.92em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.scroll th, .scroll td { white-space: nowrap; }
.stacks { margin: 0.5rem 1.2rem 0 0; }
.rule { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.tip { position: absolute; top: 4px; pointer-events: none; background: var(--tip); color: var(--tip-ink);
       font-size: 0.78rem; line-height: 1.4; padding: 0.3rem 0.55rem; border-radius: 4px; white-space: nowrap;
       font-variant-numeric: tabular-nums; z-index: 2; }
.tip b { display: block; font-weight: 600; }
.sample { margin-top: 1.5rem; }
.sample + .sample { border-top: 1px solid var(--line); padding-top: 1.25rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem 1.75rem;
           margin-top: 0.75rem; }
.answers > div { min-width: 0; }
.answers h3 span { font-weight: 400; color: var(--soft); }
.answers h3 .right { color: var(--accent); }
pre { font: 0.82rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0.35rem 0 0;
      white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.prompt { max-width: 52rem; }
mark { background: var(--wash); color: inherit; border-bottom: 2px solid var(--accent); }
mark.gap { background: none; border: 0; color: var(--accent); }
mark.gap > span:first-child { font-size: 0.65em; vertical-align: -0.45em; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.3rem 1.5rem; margin: 0;
           font-size: 0.9rem; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dd b, td b { font-weight: 600; color: var(--accent); }
.columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem 3rem; }
details { margin-top: 0.5rem; }
.intro { margin-bottom: 0.4rem; }
summary { cursor: pointer; color: var(--accent); font-size: 0.9rem; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: 0.82rem;
         color: var(--soft); }
.aloud { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 46rem) {
  main { padding: 1.75rem 1.1rem 3rem; }
  h1 { font-size: 1.6rem; } .score { font-size: 2.2rem; }
  .outcome, .grid2, .columns { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --line: #ccc; --faint: #888;
          --accent: #00585d; --wash: #e3f0ef; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  figure, .sample, .tiles, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .tip, .rule { display: none; }
  mark, .bar, .part, .dot, .swatch, .legend i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# Tooltips: text only (textContent), and charts over the same steps point at the same step together.
SCRIPT = """
(() => {
  const charts = [...document.querySelectorAll('.plot')].map(box => ({
    box, data: JSON.parse(box.dataset.tips), tip: box.querySelector('.tip'), rule: box.querySelector('.rule'), index: -1
  }));
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
    const at = chart.data.at[index], lines = chart.data.say[index];
    if (chart.rule) {
      for (const side of ['x1', 'x2']) chart.rule.setAttribute(side, 100 * at + '%');
      chart.rule.style.visibility = 'visible';
    }
    chart.tip.replaceChildren(...lines.map((line, i) => {
      const part = document.createElement(i ? 'div' : 'b');
      part.textContent = line;
      return part;
    }));
    chart.tip.style.left = at < 0.5 ? `calc(${100 * at}% + 8px)` : 'auto';
    chart.tip.style.right = at < 0.5 ? 'auto' : `calc(${100 * (1 - at)}% + 8px)`;
    chart.tip.hidden = false;
  };
  const hide = chart => {
    chart.index = -1;
    chart.tip.hidden = true;
    if (chart.rule) chart.rule.style.visibility = 'hidden';
  };
  const peers = chart => charts.filter(
    other => other === chart || (other.box.dataset.sync && other.box.dataset.sync === chart.box.dataset.sync)
  );
  const point = (chart, index) => {
    const step = chart.data.step[index];
    for (const peer of peers(chart)) show(peer, peer === chart ? index : nearest(peer.data.step, step));
  };
  for (const chart of charts) {
    if (!chart.data.at.length) continue;
    const leave = () => peers(chart).forEach(hide);
    chart.box.addEventListener('pointermove', event => {
      const frame = chart.box.getBoundingClientRect();
      point(chart, nearest(chart.data.at, (event.clientX - frame.left) / frame.width));
    });
    chart.box.addEventListener('pointerleave', leave);
    chart.box.addEventListener('blur', leave);
    chart.box.addEventListener('keydown', event => {
      const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (event.key === 'Escape') leave();
      if (!move) return;
      event.preventDefault();
      const start = chart.index < 0 ? (move > 0 ? -1 : chart.data.at.length) : chart.index;
      point(chart, Math.min(Math.max(start + move, 0), chart.data.at.length - 1));
    });
  }
  for (const title of document.querySelectorAll('.plot title')) title.remove();
  addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
  document.documentElement.classList.add('js');
})();
"""
