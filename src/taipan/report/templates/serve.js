(() => {
  const byId = (id) => document.getElementById(id);
  const model = JSON.parse(byId("model").textContent);
  const number = (count) => count.toLocaleString("en");
  const size = (bytes) => bytes < 1048576 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / 1048576).toFixed(1)} MiB`;
  const WINDOW = 2000; // tokens whose selection is shown at once
  let key = sessionStorage.getItem("taipan-key") ?? "";
  let here = null; // the session that is open
  let running = null; // what ends a reading or an answer
  let shown = null; // what ends the view of the selection
  let part = [0, 0];

  function say(text, wrong = false) {
    byId("status").textContent = text;
    byId("status").classList.toggle("error", wrong);
  }

  async function call(path, options = {}) {
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (typeof options.json !== "undefined") {
      headers["Content-Type"] = "application/json";
      options = { method: "POST", ...options, body: JSON.stringify(options.json) };
    }
    const answer = await fetch(path, { ...options, headers });
    byId("key-form").hidden = answer.status !== 401;
    if (answer.ok) return answer;
    if (answer.status === 401) throw new Error(key ? "This is not one of the server's keys." : "");
    let message = `The server answered ${answer.status}.`;
    try { message = (await answer.json()).error.message; } catch { /* not one of its own errors */ }
    throw new Error(message);
  }
  const session = (path = "") => `/v1/sessions/${encodeURIComponent(here.id)}${path}`;

  // Events of a stream, one after the other.
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const lines = held.split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  }

  // Something that takes its time, and that a button may stop; one at a time.
  async function busy(work) {
    if (running) return;
    running = new AbortController();
    enable();
    try { await work(running.signal); }
    catch (error) {
      if (error.name === "AbortError") say("Stopped.");
      else say(error.message, true);
    }
    running = null;
    enable();
  }
  function enable() {
    for (const button of document.querySelectorAll("#app .button:not(#stop, #reading-stop), #list button, #file"))
      button.disabled = running !== null;
    byId("undo").disabled ||= here === null || turns().length < 2;
    byId("earlier").disabled = running !== null || part[0] === 0;
    byId("later").disabled = running !== null || here === null || part[1] >= here.tokens;
  }

  async function list() {
    const { data } = await (await call("/v1/sessions")).json();
    byId("list-none").hidden = data.length > 0;
    byId("list").replaceChildren(...data.filter((entry) => entry.usable).map((entry) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const facts = document.createElement("span");
      facts.textContent = `${number(entry.tokens)} tokens, ${size(entry.bytes)}` + (entry.unfinished.length ? ", not read to its end" : "");
      button.type = "button";
      button.append(entry.id, facts);
      button.setAttribute("aria-current", String(here !== null && here.id === entry.id));
      button.addEventListener("click", () => busy(() => open(entry.id)));
      item.append(button);
      return item;
    }));
    return data;
  }

  const turns = () => Object.entries(here.marks).filter(([name]) => /^turn_\d+$/.test(name))
    .map(([name, place]) => [Number(name.slice(5)), place]).sort((a, b) => a[0] - b[0]);

  async function refresh() {
    here = await (await call(session())).json();
    byId("facts").textContent = `${number(here.tokens)} tokens known, ${size(here.bytes)} on disk. A question reads none of them again.`;
    await list();
  }

  function paragraph(kind, text) {
    const made = document.createElement("p");
    made.className = kind;
    made.textContent = text;
    byId("log").append(made);
    byId("log").scrollTop = byId("log").scrollHeight;
    return made;
  }

  async function open(id) {
    here = { id };
    await refresh();
    byId("talk").hidden = false;
    byId("talk-title").textContent = id;
    await earlier();
    byId("talk-title").focus({ preventScroll: true });
    byId("talk").scrollIntoView({ block: "nearest" });
    say(`${id}: ${number(here.tokens)} tokens are known, none of them was read again.`);
    await select(Math.max(0, here.tokens - WINDOW), here.tokens);
  }

  // What was said before, as the model has read it.
  async function earlier() {
    byId("log").replaceChildren();
    const places = turns();
    if (!places.length || places[0][1] === here.tokens) return;
    const begin = Math.max(places[0][1], here.tokens - 8000);
    const { text } = await (await call(session(`/text?begin=${begin}`))).json();
    if (text.trim()) paragraph("before", text.trim());
  }

  async function read(name, headers, body, query) {
    await busy(async (signal) => {
      const known = new Set((await list()).map((entry) => entry.id));
      const plain = name.replace(/\.[a-z0-9]{1,5}$/i, "").normalize("NFKD").replace(/[^A-Za-z0-9_-]+/g, "-").replace(/^[^A-Za-z0-9]+|-+$/g, "").slice(0, 50) || "text";
      let id = plain;
      for (let count = 2; known.has(id); count++) id = `${plain}-${count}`;
      say("");
      byId("reading").hidden = false;
      byId("reading-name").textContent = `Reading ${name}`;
      byId("reading-tokens").textContent = "";
      byId("reading-layers").textContent = "";
      byId("reading-text").hidden = true;
      byId("progress").value = 0;
      const begin = performance.now();
      try {
        const answer = await call(`/v1/sessions?id=${id}&stream=true&selection=true${query}`, { method: "POST", headers, body, signal });
        let end = null;
        for await (const event of events(answer)) {
          if (event.object === "session") { end = event; continue; }
          if (event.selection) watch(event.selection);
          const rate = Math.round(event.tokens / Math.max(0.001, (performance.now() - begin) / 1000));
          byId("progress").value = event.tokens / event.total;
          byId("reading-tokens").textContent = `${number(event.tokens)} of ${number(event.total)} tokens, ${number(rate)} a second`;
        }
        if (end === null) throw new Error("The reading was cut off: send the same file again to go on.");
        await open(end.id);
      } finally {
        byId("reading").hidden = true;
        await list();
      }
    });
  }

  // The last tokens that have been read, those coloured that a gate selected.
  function watch({ tokens, layers }) {
    if (!layers.length) return;
    let held = "", chosen = false;
    const pieces = [];
    tokens.forEach((text, token) => { // a token that ends inside a character belongs to the piece that completes it
      held += text;
      chosen ||= layers.some(({ selected }) => selected[token] === 1);
      if (!held && token < tokens.length - 1) return;
      const piece = document.createElement(chosen ? "b" : "span");
      piece.textContent = held;
      if (chosen) piece.className = "s5";
      pieces.push(piece);
      [held, chosen] = ["", false];
    });
    byId("reading-text").replaceChildren(...pieces);
    byId("reading-text").hidden = false;
    byId("reading-text").scrollTop = byId("reading-text").scrollHeight; // the last ones are seen
    byId("reading-layers").textContent = layers.map(({ layer, percent }) => `layer ${layer} selected ${percent} %`).join(", ");
  }
  const readFile = (file) => read(file.name, { "Content-Type": "text/plain" }, file, `&file=${encodeURIComponent(file.name)}`);

  async function ask(text) {
    await busy(async (signal) => {
      const question = paragraph("question", text), answer = paragraph("writing", "");
      byId("stop").hidden = false;
      say("");
      try {
        const body = { model, session: here.id, keep: true, stream: true, max_tokens: 400, temperature: 0.8, top_p: 0.95, messages: [{ role: "user", content: text }] };
        for await (const { choices } of events(await call("/v1/chat/completions", { json: body, signal }))) {
          answer.textContent += choices[0]?.delta?.content ?? "";
          byId("log").scrollTop = byId("log").scrollHeight;
        }
        answer.className = "";
        answer.textContent = answer.textContent.trim() || "(nothing)";
        byId("question").value = "";
        const before = here.tokens;
        await refresh();
        say(`The answer is a part of ${here.id} now: ${number(here.tokens - before)} new tokens.`);
        await select(Math.max(0, here.tokens - WINDOW), here.tokens);
      } catch (error) { // the session stays as it was
        question.remove();
        answer.remove();
        throw error;
      } finally {
        byId("stop").hidden = true;
      }
    });
    byId("question").focus();
  }

  async function select(begin, end) {
    part = [begin, end];
    const { tokens, layers } = await (await call(session(`/selection?begin=${begin}&end=${end}`))).json();
    shown?.();
    shown = null;
    byId("seen").hidden = !layers.length;
    byId("range").textContent = `tokens ${number(begin)} to ${number(end)} of ${number(here.tokens)}`;
    if (!layers.length) return;
    byId("viewer-place").replaceChildren(byId("viewer-template").content.cloneNode(true));
    const names = [...layers.map(({ layer }) => `layer ${layer}`), ...(layers.length > 1 ? ["all layers"] : [])];
    byId("viewer").querySelector(".choice").append(...names.map((name, place) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
      button.dataset.layer = place;
      return button;
    }));
    // a token that ends inside a character belongs to the piece that completes it
    const first = [], pieces = [];
    let from = 0;
    tokens.forEach((text, token) => {
      if (!text && token < tokens.length - 1) return;
      const piece = document.createElement("b");
      piece.textContent = text;
      if (/^[\r\n]/.test(text)) piece.setAttribute("n", "");
      pieces.push(piece);
      first.push(from);
      from = token + 1;
    });
    const block = document.createElement("div");
    block.append(...pieces);
    byId("text").append(block);
    const scaled = layers.map((layer) => {
      const chosen = layer.margin.filter((_, token) => layer.selected[token]).sort((a, b) => a - b);
      const low = layer.threshold ?? chosen[0] ?? 0;
      return { ...layer, low, high: Math.max(chosen[Math.floor(0.95 * (chosen.length - 1))] ?? low + 1, low + 0.01) };
    });
    shown = showSelection({
      layers: scaled, first, count: tokens.length,
      selected: (layer, token) => layers[layer].selected[token] === 1,
      margin: (layer, token) => layers[layer].margin[token],
    });
  }

  byId("file").addEventListener("change", () => {
    const [file] = byId("file").files;
    if (file) readFile(file).then(() => { byId("file").value = ""; });
  });
  // A file may be dropped anywhere: beside the box the browser would leave the page to show it.
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dragging");
  });
  addEventListener("pointermove", () => document.body.classList.remove("dragging")); // whoever moves it drags nothing
  for (const kind of ["dragenter", "dragover", "drop"])
    addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return; // a text that is dragged into a field
      event.preventDefault();
      document.body.classList.toggle("dragging", kind !== "drop");
      if (kind !== "drop") return;
      const files = event.dataTransfer.files;
      if (running) say("Something is being read or written: wait for it, or stop it.", true);
      else if (files.length !== 1) say(`${files.length} files were dropped: drop one at a time.`, true);
      else readFile(files[0]);
    });
  byId("paste-form").addEventListener("submit", (event) => {
    event.preventDefault();
    read("pasted", { "Content-Type": "text/plain" }, byId("paste").value, "&file=pasted").then(() => { byId("paste").value = ""; });
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = byId("key").value;
    sessionStorage.setItem("taipan-key", key);
    busy(async () => { await list(); say(""); });
  });
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(byId("question").value.trim());
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (byId("question").value.trim()) byId("ask-form").requestSubmit();
  });
  for (const name of ["stop", "reading-stop"]) byId(name).addEventListener("click", () => running?.abort());
  byId("fork").addEventListener("click", () => busy(async () => {
    const origin = here.id;
    await open((await (await call(session("/fork"), { json: {} })).json()).id);
    say(`This is the copy ${here.id} now; ${origin} stays as it was.`);
  }));
  byId("undo").addEventListener("click", () => busy(async () => {
    const [last] = turns().at(-2);
    await call(session("/rollback"), { json: { to: `turn_${last}` } });
    await open(here.id);
    say("The last question and its answer are taken back; nothing was read again.");
  }));
  byId("download").addEventListener("click", () => busy(async (signal) => {
    const address = URL.createObjectURL(await (await call(session("/archive"), { signal })).blob());
    Object.assign(document.createElement("a"), { href: address, download: `${here.id}.session.tar` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  }));
  byId("delete").addEventListener("click", () => {
    if (confirm(`Delete ${here.id}? What was read and said is gone then.`))
      busy(async () => {
        await call(session(), { method: "DELETE" });
        say(`${here.id} is deleted.`);
        here = null;
        shown?.();
        byId("talk").hidden = byId("seen").hidden = true;
        await list();
        byId("file").focus();
      });
  });
  busy(list);
})();
