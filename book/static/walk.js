// The interactive page: pick a scene, a model, a budget; slide through the reply. All data stand in the page itself.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("walk-data").textContent);
  const el = (id) => document.getElementById("walk-" + id);
  const types = [["sys", "system prompt"], ["img", "image"], ["ins", "instruction"], ["res", "response"]];
  const total = data.grid * data.grid;
  const state = { scene: 0, model: 0, budget: 0, step: 0 };
  const models = Object.keys(data.models);
  const budgets = Object.keys(data.models[models[0]].runs).sort((a, b) => b - a);
  const percent = (x) => (100 * x).toFixed(x > 0 && x < 0.1 ? 1 : 0) + " %";
  let timer = null;

  const make = (tag, attributes = {}, text = "") => {
    const svg = ["rect", "path", "line", "title"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  };

  const choice = (parent, name, labels, picked, onPick) => {
    labels.forEach((content, i) => {
      const label = make("label");
      const input = make("input", { type: "radio", name: "walk-" + name, value: i });
      input.checked = i === picked;
      input.addEventListener("change", () => onPick(i));
      label.append(input, content);
      parent.append(label);
    });
  };

  const run = () => data.models[models[state.model]].runs[budgets[state.budget]][data.scenes[state.scene].key];

  const cells = (tokens) =>
    tokens.map((i) => `M${i % data.grid} ${Math.floor(i / data.grid)}h1v1h-1z`).join("");

  const missing = (kept, ranking) => {
    const stays = new Set(ranking.slice(0, kept));
    return Array.from({ length: total }, (_, i) => i).filter((i) => !stays.has(i));
  };

  // ------------------------------------------------------------------------------- what changes with scene, model, budget

  const choose = () => {
    const scene = data.scenes[state.scene], model = data.models[models[state.model]], now = run();
    const steps = now.kept.length;
    state.step = Math.min(state.step, steps - 1);
    el("img").src = scene.picture;
    el("img").alt = "A rendered scene: " + scene.reference;
    el("prompt").textContent = scene.prompt;
    el("step").max = steps - 1;
    const words = el("words");
    words.replaceChildren();
    now.words.forEach((word, t) => {
      const button = make("button", { type: "button" }, word === "</s>" ? "■" : word);
      if (word === "</s>") button.title = "end of the reply";
      button.addEventListener("click", () => go(t));
      words.append(button, " ");
    });
    const rate = el("rate"), shares = el("shares");
    for (const chart of [rate, shares]) {
      chart.replaceChildren(make("rect", { class: "at", y: 0, width: 1, height: 100 }));
      chart.setAttribute("viewBox", `0 0 ${steps} 100`);
    }
    rate.setAttribute("aria-label", "Removed share by step, from " + percent(1 - now.kept[0] / total) + " to " +
      percent(1 - now.kept[steps - 1] / total));
    shares.setAttribute("aria-label", "Shares of attention by step: system prompt, image, instruction, response");
    let line = "";
    now.kept.forEach((kept, t) => {
      const y = 100 * kept / total, chosen = 100 * (1 - model.rates[now.chosen[t]]);
      line += (t ? "L" : "M") + `${t} ${y}L${t + 1} ${y}`;
      rate.append(make("line", { class: "chosen", x1: t + 0.2, x2: t + 0.8, y1: chosen, y2: chosen }));
      let top = 100;
      now.shares[t].forEach((share, k) => {
        const height = 100 * share;
        top -= height;
        const bar = make("rect", { class: types[k][0], x: t + 0.04, y: Math.max(0, top), width: 0.92, height });
        bar.append(make("title", {}, `${types[k][1]} ${percent(share)}`));
        shares.append(bar);
      });
    });
    rate.append(make("path", { class: "area", d: `${line}L${steps} 100L0 100z` }),
      make("path", { class: "line", d: line }));
    const said = el("said");
    said.replaceChildren();
    const rows = [["DyRate", now.text], ["unpruned", model.unpruned[scene.key]], ["a reference", scene.reference],
      ["FLOPs", `${percent(now.flops.paper)} of the unpruned model's by the paper's convention, ${percent(now.flops.cached)} as a ` +
        `cached decoder computes them. Layers ${model.layer} to ${model.n_layers - 1} of ${models[state.model]} are pruned.`]];
    for (const [term, text] of rows) said.append(make("dt", {}, term), make("dd", {}, text));
    show();
  };

  // --------------------------------------------------------------------------------------------- what changes with the step

  const show = () => {
    const now = run(), t = state.step, kept = now.kept[t], steps = now.kept.length;
    const gone = missing(kept, now.ranking);
    const fresh = t ? now.ranking.slice(kept, now.kept[t - 1]) : [];
    const recent = new Set(fresh);
    el("gone").setAttribute("d", cells(gone.filter((i) => !recent.has(i))));
    el("new").setAttribute("d", cells(fresh));
    const word = now.words[t] === "</s>" ? "the end" : `“${now.words[t]}”`;
    const lost = fresh.length ? `, ${fresh.length} fewer than before` : "";
    el("kept").textContent = `${kept} of ${total} image tokens are read${lost}: ${percent(1 - kept / total)} removed.`;
    el("at").textContent = `step ${t} of ${steps - 1}: ${word}`;
    el("step").value = t;
    el("step").setAttribute("aria-valuetext", `step ${t}, ${word}, ${kept} image tokens read`);
    for (const [i, button] of el("words").querySelectorAll("button").entries()) {
      button.className = i < t ? "past" : i === t ? "now" : "";
      button.toggleAttribute("aria-current", i === t);
    }
    for (const chart of [el("rate"), el("shares")]) chart.querySelector(".at").setAttribute("x", t);
    el("legend").querySelectorAll("b").forEach((node, k) => (node.textContent = percent(now.shares[t][k])));
    const place = new URLSearchParams({ scene: data.scenes[state.scene].key, model: models[state.model],
      budget: budgets[state.budget], step: t });
    try { history.replaceState(null, "", "#" + place); } catch { /* some viewers of local files forbid it */ }
  };

  const go = (step) => {
    state.step = Math.max(0, Math.min(step, run().kept.length - 1));
    show();
  };

  const stop = () => {
    clearInterval(timer);
    timer = null;
    el("play").textContent = "▶";
    el("play").setAttribute("aria-label", "Play");
  };

  const play = () => {
    if (timer) return stop();
    if (state.step >= run().kept.length - 1) go(0);
    el("play").textContent = "❚❚";
    el("play").setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      go(state.step + 1);
      if (state.step >= run().kept.length - 1) stop();
    }, 450);
  };

  // ------------------------------------------------------------------------------------------------------------------ start

  const asked = new URLSearchParams(location.hash.slice(1));
  const find = (list, value, otherwise) => (list.includes(value) ? list.indexOf(value) : otherwise);
  const many = data.scenes.findIndex((s) => s.kind === "many objects");
  state.scene = find(data.scenes.map((s) => s.key), asked.get("scene"), Math.max(0, many));
  state.model = find(models, asked.get("model"), models.length - 1);
  state.budget = find(budgets, asked.get("budget"), Math.min(1, budgets.length - 1));
  state.step = Math.max(0, parseInt(asked.get("step") ?? "0", 10) || 0);

  const pictures = data.scenes.map((scene) => {
    const span = make("span");
    span.append(make("img", { src: scene.picture, alt: "", width: 64, height: 64 }), make("small", {}, scene.kind));
    return span;
  });
  const pick = (name) => (i) => { stop(); state[name] = i; if (name === "scene") state.step = 0; choose(); };
  choice(el("scenes"), "scene", pictures, state.scene, pick("scene"));
  choice(el("models"), "model", models, state.model, pick("model"));
  choice(el("budgets"), "budget", budgets.map((b) => percent(b)), state.budget, pick("budget"));
  types.forEach(([key, label]) => {
    const item = make("li", { class: key });
    item.append(make("i"), label + " ", make("b"));
    el("legend").append(item);
  });
  el("step").addEventListener("input", (event) => { stop(); go(+event.target.value); });
  el("play").addEventListener("click", play);
  for (const chart of [el("rate"), el("shares")])
    chart.addEventListener("click", (event) => {
      const box = chart.getBoundingClientRect();
      go(Math.floor(((event.clientX - box.left) / box.width) * run().kept.length));
    });
  document.getElementById("walk").hidden = false;
  choose();
})();
