addEventListener('load', () => {
  const light = color => color.match(/[\d.]+/g).slice(0, 3).map(Number).map(
    c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const worst = Math.min(...[...document.querySelectorAll('main *')].filter(
    e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
      && !e.closest('.tip, title, [aria-hidden]')
  ).map(e => {
    const style = getComputedStyle(e), ink = light(e.closest('svg') ? style.fill : style.color);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  }));
  const ticks = [...document.querySelectorAll('.tick')].map(e => e.getBoundingClientRect());
  const root = document.documentElement;
  parent.document.title += [frameElement.id, innerWidth, root.scrollWidth,
    Math.min(0, ...ticks.map(t => t.left)) >= 0, Math.max(0, ...ticks.map(t => t.right)) <= innerWidth,
    worst.toFixed(2), page < 0.1 ? 'dark' : 'light'].join(' ') + ';';
});
