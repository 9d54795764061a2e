// Keeps a page up to date: when the server says that something is new, the page is read again, and what differs is
// put in its place. What the reader has open, chosen, typed or pointed at stays.
(() => {
  const REDRAW_MS = 2500; // between two redraws
  const main = document.querySelector('main'), link = document.getElementById('link');
  let stream = null, timer = 0, drawnAt = Date.now();

  const say = (text, live) => { link.textContent = text; link.classList.toggle('live', live); };
  const key = node => node.id || node.querySelector?.(':scope > h2')?.textContent || node.getAttribute?.('aria-label') || '';

  const morph = (old, fresh) => {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== Node.ELEMENT_NODE) { old.data = fresh.data; return; }
    if (old.className === 'tip') return; // the report's script fills it
    for (const {name} of [...old.attributes]) if (name !== 'open' && !fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const {name, value} of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    const left = [...old.childNodes];
    let at = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      const place = left.findIndex(one => one.nodeName === child.nodeName && key(one) === key(child));
      if (place < 0) { old.insertBefore(document.importNode(child, true), at); continue; }
      const [found] = left.splice(place, 1);
      if (found === at) at = at.nextSibling; else old.insertBefore(found, at);
      morph(found, child);
    }
    for (const one of left) one.remove();
  };

  const redraw = async () => {
    timer = 0;
    if (document.hidden) return; // it is drawn when it is seen again
    try {
      const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), 'text/html');
      for (const title of page.querySelectorAll('.plot title')) title.remove(); // as the report's script does
      morph(main, page.querySelector('main'));
      document.title = page.title;
      document.dispatchEvent(new Event('redrawn'));
    } catch {
      say('The server does not answer', false);
    }
    drawnAt = Date.now();
    if (!main.dataset.events) close();
  };
  const soon = () => { timer ||= setTimeout(redraw, Math.max(0, drawnAt + REDRAW_MS - Date.now())); };

  const close = () => { stream?.close(); stream = null; say('', false); };
  const open = () => {
    if (stream || !main.dataset.events) return;
    stream = new EventSource(main.dataset.events);
    stream.onopen = () => say('Live', true);
    stream.onerror = () => {
      say('The server does not answer', false);
      if (stream?.readyState === EventSource.CLOSED) { close(); setTimeout(open, 5000); }
    };
    for (const kind of ['records', 'changed', 'gone']) stream.addEventListener(kind, soon);
    stream.addEventListener('records', event => {
      const steps = JSON.parse(event.data).records.filter(record => record.kind !== 'eval'), last = steps.at(-1);
      const step = document.getElementById('now-step'), loss = document.getElementById('now-loss');
      if (step && last) step.textContent = (last.step ?? last.round).toLocaleString('en');
      if (loss && last?.loss !== undefined) loss.textContent = String(Number(last.loss.toPrecision(4)));
    });
  };
  // The key of `qvera ui --train` stays in its tab, for links to the form.
  const secret = new URLSearchParams(location.search).get('key');
  if (secret) sessionStorage.setItem('key', secret);
  document.addEventListener('click', event => {
    const link = event.target.closest?.('.with-key');
    if (link) link.search = new URLSearchParams({key: sessionStorage.getItem('key') ?? ''});
  });
  document.addEventListener('submit', event => { if (event.target.method === 'post') say('Working …', true); });
  // A browser keeps few connections to one server: a page that nobody sees gives its own back.
  document.addEventListener('visibilitychange', () => {
    if (document.hidden) { close(); return; }
    redraw().then(open);
  });
  addEventListener('pagehide', close);
  addEventListener('pageshow', event => { if (event.persisted) soon(); open(); });
  open();
})();
