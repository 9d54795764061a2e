const plots = [...document.querySelectorAll('.plot')];
const shown = box => {
  const frame = box.getBoundingClientRect();
  box.dispatchEvent(new PointerEvent('pointermove', {clientX: frame.right}));
  const tips = [...document.querySelectorAll('.tip:not([hidden])')].map(
    tip => [...tip.children].map(part => part.textContent).join('|'));
  box.dispatchEvent(new PointerEvent('pointerleave'));
  return tips;
};
const colours = new Set([...document.querySelectorAll('.axes path[class*=" c"]')].map(p => getComputedStyle(p).stroke));
document.title = [plots.length, shown(plots[0])[1], shown(plots[2])[1], colours.size].join(' ; ');
