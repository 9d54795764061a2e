// Chat with the base model and its adapters, side by side. Talks to /v1/models and /v1/chat/completions alone.

const SHOWN_AT_ONCE = 200;
const MOST_PANES = 4;
const at = (id) => document.getElementById(id);
const isWide = () => window.innerWidth > 736; // the breakpoint of page.css, 46rem
const panes = new Map(); // name of a model -> {element, talk, messages}
let models = [];
let running = null; // AbortController of the answers that are being written
let key = sessionStorage.getItem("qvera-key");

async function ask(path, options = {}) {
  const headers = { ...(options.headers ?? {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
  error.status = answer.status;
  throw error;
}

function bytes(number) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (number >= 1000 && unit < 3) { number /= 1000; unit += 1; }
  return `${unit ? number.toPrecision(3) : number} ${units[unit]}`;
}

// What the server knows of a model beyond its name. It is asked for models that are seen, once each.
const asked = new Map();
async function facts(model) {
  if (!model.parent) return "base model";
  if (!asked.has(model.id)) {
    const path = `v1/models/${model.id.split("/").map(encodeURIComponent).join("/")}`;
    asked.set(model.id, ask(path).then((answer) => answer.json()).then((card) => card.qvera ?? {}, (error) => ({ error: error.message })));
  }
  const found = await asked.get(model.id);
  if (found.error) return found.error;
  const parts = [];
  if (found.size_bytes) parts.push(bytes(found.size_bytes));
  if (found.rows) parts.push(`${found.rows.toLocaleString()} rows`);
  const [before, after] = [found.loss_before, found.loss];
  if (after != null) parts.push(before == null ? `loss ${after.toFixed(3)}` : `loss ${before.toFixed(3)} → ${after.toFixed(3)}`);
  return parts.join(" · ");
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    facts(models.find((model) => model.id === target.title)).then((text) => { target.lastElementChild.textContent = text; });
  }
});

function drawList() {
  const wanted = at("filter").value.trim().toLowerCase();
  const fitting = models.filter((model) => !wanted || model.id.toLowerCase().includes(wanted));
  const shown = fitting.slice(0, SHOWN_AT_ONCE);
  at("list").replaceChildren(...shown.map((model) => {
    const [row, label, box, name, small] = ["li", "label", "input", "span", "small"].map((tag) => document.createElement(tag));
    box.type = "checkbox";
    box.checked = panes.has(model.id);
    box.disabled = !box.checked && panes.size >= MOST_PANES;
    box.addEventListener("change", () => choose(model, box.checked));
    name.textContent = model.id;
    label.append(box, name, small);
    label.title = model.id;
    seen.observe(label);
    row.append(label);
    return row;
  }));
  at("more").hidden = fitting.length > 0 && fitting.length <= SHOWN_AT_ONCE;
  at("more").textContent = fitting.length ? `${shown.length} of ${fitting.length.toLocaleString()} shown. Filter to find others.` : "No model has this in its name.";
  at("chosen").textContent = `${panes.size} of ${MOST_PANES} at most`;
}

function choose(model, on) {
  if (!on) {
    panes.get(model.id)?.element.remove();
    panes.delete(model.id);
  } else if (!panes.has(model.id)) {
    const element = at("pane").content.firstElementChild.cloneNode(true);
    element.querySelector("h2").textContent = model.id;
    facts(model).then((text) => {
      element.querySelector(".facts").textContent = [text, model.parent ? `on ${model.parent}` : ""].filter(Boolean).join(" · ");
    });
    at("panes").append(element);
    panes.set(model.id, { element, talk: element.querySelector(".talk"), messages: [] });
  }
  at("panes").querySelector(".empty")?.remove();
  if (!panes.size) {
    const hint = document.createElement("p");
    hint.className = "empty";
    hint.textContent = "Choose a model on the left.";
    at("panes").append(hint);
  }
  const focused = document.activeElement?.closest("li") ? model.id : null;
  drawList();
  if (focused) [...at("list").querySelectorAll("label")].find((one) => one.title === focused)?.querySelector("input").focus();
}

function say(pane, kind, text) {
  const element = document.createElement("div");
  element.className = `said ${kind}`;
  element.textContent = text;
  pane.talk.append(element);
  pane.talk.scrollTop = pane.talk.scrollHeight;
  return element;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    kept += value;
    const blocks = kept.split(/\r?\n\r?\n/);
    kept = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answerIn(name, pane, signal) {
  const element = say(pane, "assistant waiting", "");
  const system = at("system").value.trim();
  const talk = pane.messages; // clearing all chats begins another
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...talk];
  const began = performance.now();
  let [text, tokens, first] = ["", 0, null];
  try {
    const answer = await ask("v1/chat/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: name, messages, stream: true, stream_options: { include_usage: true },
        temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
      }),
    });
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first ??= performance.now();
      text += piece;
      element.textContent = text;
      pane.talk.scrollTop = pane.talk.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      say(pane, "wrong", error.message);
      if (error.status === 401) login(true);
    }
  } finally {
    element.classList.remove("waiting");
    if (text) talk.push({ role: "assistant", content: text });
    else { element.remove(); talk.pop(); } // without an answer the question is not part of the talk
    if (tokens) {
      const seconds = (performance.now() - began) / 1000;
      const line = document.createElement("p");
      line.className = "measured soft";
      line.textContent = `${tokens} tokens, first after ${(((first ?? began) - began) / 1000).toFixed(2)} s, ${seconds.toFixed(1)} s in all`;
      element.after(line);
    }
  }
}

async function send() {
  const text = at("prompt").value.trim();
  if (!text || running || !panes.size) return;
  running = new AbortController();
  at("prompt").value = "";
  at("send").textContent = "Stop";
  const open = [...panes];
  for (const [, pane] of open) {
    pane.messages.push({ role: "user", content: text });
    say(pane, "user", text);
  }
  await Promise.all(open.map(([name, pane]) => answerIn(name, pane, running.signal)));
  running = null;
  at("send").textContent = "Send";
  if (isWide()) at("prompt").focus(); // on a phone the keyboard would cover the answers
}

function login(refused) {
  at("refused").hidden = !refused || !key;
  if (!at("login").open) at("login").showModal();
}

async function start() {
  try {
    models = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401 || error.status === 403) return login(true);
    at("server").textContent = error.message;
    return;
  }
  const adapters = models.filter((model) => model.parent).length;
  at("server").textContent = `${adapters.toLocaleString()} adapter${adapters === 1 ? "" : "s"} on ${models.find((model) => !model.parent)?.id ?? "no base"}`;
  const [base, adapter] = [models.find((model) => !model.parent), models.find((model) => model.parent)];
  for (const model of [base, adapter]) if (model) choose(model, true);
  at("models").open = isWide() || !panes.size;
  if (isWide()) at("prompt").focus();
}

at("filter").addEventListener("input", drawList);
at("ask").addEventListener("submit", (event) => { event.preventDefault(); running ? running.abort() : send(); });
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
at("clear").addEventListener("click", () => {
  running?.abort();
  for (const pane of panes.values()) { pane.messages = []; pane.talk.replaceChildren(); }
});
at("login").addEventListener("close", () => {
  key = at("key").value;
  at("key").value = "";
  sessionStorage.setItem("qvera-key", key);
  start();
});
start();
