const box = document.querySelector('.plot'), frame = box.getBoundingClientRect();
const move = x => box.dispatchEvent(new PointerEvent('pointermove', {clientX: frame.left + x * frame.width}));
move(80 / 96);
const shown = [...document.querySelectorAll('.tip:not([hidden])')].map(
  tip => [...tip.children].map(part => part.textContent).join('|'));
box.dispatchEvent(new PointerEvent('pointerleave'));
const left = document.querySelectorAll('.tip:not([hidden])').length;
box.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));
const keyed = box.querySelector('.tip b').textContent;
document.title = [shown.length, shown[0], shown[4], left, keyed].join(' ; ');
