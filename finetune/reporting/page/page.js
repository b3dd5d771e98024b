// Draws the figures and the browser of predictions. Text from runs only ever becomes textContent or a chart's datum.

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const PAGE_ROWS = 5;
const DIFF_CELLS = 1_000_000; // of the table that marks differences; longer pairs are shown unmarked
let data, rows;

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const word = (text) => (root.dataset.language === "zh" && data.words[text]) || text;
const unique = (values) => [...new Set(values)];

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// ---- controls ----

function fill(id, values, { chosen, label = word } = {}) {
  const select = $(id);
  const before = chosen ?? select.value;
  select.replaceChildren(...values.map((value) => {
    const option = element("option", label(value));
    option.value = value;
    return option;
  }));
  if (values.includes(before)) select.value = before;
  select.parentElement.hidden = values.length < 2;
}

const task = (id) => data.tasks.find((each) => each.name === $(id).value) ?? data.tasks[0];

// ---- figures ----

function translated(value) {
  if (Array.isArray(value)) return value.map(translated);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [
    key, key === "title" && typeof inner === "string" ? word(inner) : translated(inner),
  ]));
}

function config() {
  const style = getComputedStyle(root);
  const [ink, quiet, line] = ["--ink", "--quiet", "--line"].map((name) => style.getPropertyValue(name).trim());
  const text = { labelColor: ink, titleColor: quiet, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: "transparent",
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: { ...text, gridColor: line, domainColor: line, tickColor: line },
    legend: text,
    text: { color: ink },
    range: { category: { scheme: "tableau10" } },
  };
}

async function draw(id, values, change = (figure) => figure) {
  const place = $(id);
  if (!values.length) {
    place.replaceChildren(element("p", word("no data"), "quiet"));
    return;
  }
  const figure = change(translated(structuredClone(data.figures[id])));
  figure.datasets = { values };
  delete figure.config;
  const { step } = figure.height; // Vega-Lite warns of heights by step where the width follows the page
  if (step && figure.width === "container") figure.height = step * unique(values.map((each) => each.method)).length;
  const actions = { export: true, source: false, compiled: false, editor: false };
  const theme = root.dataset.theme === "dark" ? "dark" : undefined;
  const options = { renderer: "svg", actions, config: config(), tooltip: { theme } };
  await window.vegaEmbed(place, figure, options);
}

// What stands on one square of the matrix, and what hovering tells.
function square(cell, [value, spread], { digits, isLead, isLight }) {
  const quiet = getComputedStyle(root).getPropertyValue("--quiet").trim();
  const isKnown = value !== null;
  const place = isLead && isKnown ? cell.place : "";
  const number = isKnown ? value.toFixed(digits) : word(cell.state === "done" ? "–" : cell.state);
  const marks = [place === "tie" ? " ≈" : "", cell.failed.length ? " ⚠" : ""].join("");
  return {
    model: cell.model,
    method: cell.method,
    value,
    text: number + marks,
    bold: place === "best",
    ink: !isKnown ? quiet : isLight ? "#111" : "#fff",
    score: number + (spread ? ` ± ${spread.toFixed(digits)}` : ""),
    seeds: cell.seeds,
    place: word(place),
    "failed checks": cell.failed.join("; "),
    reason: word(cell.reason),
  };
}

const digitsFor = (values) => (Math.max(...values.map(Math.abs)) < 10 ? 3 : 2);

async function drawMatrix() {
  const { cells, parts, scores } = task("matrix-task");
  const names = scores.map(([name]) => name);
  fill("matrix-part", parts);
  const part = $("matrix-part").value;
  const shown = names.filter((_, index) => cells.some((cell) => cell.values[part]?.[index]));
  fill("matrix-score", shown, { chosen: $("matrix-score").value || data.lead });
  const index = names.indexOf($("matrix-score").value);
  const better = scores[index]?.[1] || 1;
  const numbers = cells.map((cell) => cell.values[part]?.[index] ?? [null, null]);
  const known = numbers.map(([value]) => value).filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const isLead = part === "mean" && names[index] === data.lead;
  const values = cells.map((cell, at) => {
    const share = high > low ? (numbers[at][0] - low) / (high - low) : 1;
    return square(cell, numbers[at], { digits: digitsFor(known), isLead, isLight: (better < 0 ? 1 - share : share) > 0.55 });
  });
  $("matrix-key").hidden = !isLead;
  await draw("heat", index < 0 ? [] : values, (figure) => {
    figure.layer[0].encoding.color.scale.reverse = better < 0;
    for (const layer of figure.layer) {
      layer.encoding.tooltip = layer.encoding.tooltip.filter(({ field }) => values.some((each) => each[field]));
    }
    const columns = unique(values.map((each) => each.model));
    for (const { encoding } of figure.layer) { // also of cells without a number, which are no part of a scale by themselves
      encoding.x.sort = columns;
      encoding.y.sort = unique(values.map((each) => each.method));
    }
    if (columns.length < 7) figure.width = { step: Math.max(110, ...columns.map((name) => 8 * Math.min(name.length, 18))) };
    return figure;
  });
}

async function drawIntervals() {
  const chosen = data.comparisons.filter((each) => each.task === $("interval-task").value);
  fill("interval-model", chosen.map((each) => each.model));
  const comparison = chosen.find((each) => each.model === $("interval-model").value);
  const values = (comparison?.standings ?? []).map((each) => ({ ...each, place: word(each.place) }));
  await draw("interval", values.sort((a, b) => b.mean - a.mean), (figure) => {
    for (const { encoding } of figure.layer) {
      encoding.color.scale.domain = ["best", "tie", "below"].map(word);
      if (encoding.x?.title) encoding.x.title = data.lead;
    }
    return figure;
  });
}

function withKinds(points) {
  // front: no cell of the same base is as good for less; a base that trains nothing is a level, not a rival
  for (const model of unique(points.map((point) => point.model))) {
    let best = -Infinity;
    const own = points.filter((point) => point.model === model && point.kind !== "base");
    for (const point of own.sort((a, b) => a.cost - b.cost || b.score - a.score)) {
      point.kind = point.score > best ? "front" : "dominated";
      best = Math.max(best, point.score);
    }
  }
  // each method is named once, at its highest point: names of several bases would lie upon each other
  const isNamed = (point) => points.length <= 12 || point.kind !== "dominated";
  for (const method of unique(points.map((point) => point.method))) {
    const own = points.filter((point) => point.method === method && isNamed(point));
    if (own.length) own.reduce((a, b) => (b.score > a.score ? b : a)).label = method;
  }
  return points.map((point) => ({ label: "", ...point }));
}

async function drawCosts() {
  const { cells, scores, costs } = task("cost-task");
  const trainable = costs.indexOf("trainable");
  const named = (name) => scores.findIndex(([other]) => other === name);
  const offered = ["trainable", "peak GiB", "train s"].filter((name) => cells.some((cell) => cell.costs[costs.indexOf(name)]));
  fill("cost-cost", offered);
  const names = scores.filter(([, better]) => better > 0).map(([name]) => name);
  fill("cost-score", names.filter((name) => cells.some((cell) => cell.values.mean?.[named(name)])),
    { chosen: $("cost-score").value || data.lead });
  fill("cost-model", ["all", ...unique(cells.filter((cell) => cell.state === "done").map((cell) => cell.model))]);
  const [cost, score, model] = [costs.indexOf($("cost-cost").value), named($("cost-score").value), $("cost-model").value];
  const points = cells
    .filter((cell) => model === "all" || cell.model === model)
    .map((cell) => ({
      model: cell.model,
      method: cell.method,
      cost: cell.costs[cost],
      score: cell.values.mean?.[score]?.[0],
      kind: cell.costs[trainable] === 0 ? "base" : "",
    }))
    .filter((point) => point.score != null && (point.kind === "base" || point.cost > 0));
  await draw("cost", withKinds(points), (figure) => {
    for (const { encoding } of figure.layer) {
      if (encoding.x?.title) encoding.x.title = word($("cost-cost").value);
      encoding.y.title = word($("cost-score").value);
    }
    return figure;
  });
}

async function drawLosses() {
  const chosen = data.curves.filter((curve) => curve.task === $("loss-task").value);
  fill("loss-model", unique(chosen.map((curve) => curve.model)));
  const curves = chosen.filter((curve) => curve.model === $("loss-model").value);
  const values = curves.flatMap(({ method, part, points }) =>
    points.map(([step, loss]) => ({ method, part, curve: word(part), step, loss })));
  await draw("loss", values);
}

// ---- predictions ----

const browse = { page: 0, hidden: new Set() };

function difference(left, right) {
  // [[kind, text]]: " " in both, "-" only left, "+" only right; null when the pair is too long
  const [a, b] = [Array.from(left), Array.from(right)];
  if ((a.length + 1) * (b.length + 1) > DIFF_CELLS) return null;
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const found = [];
  const add = (kind, text) => {
    const last = found.at(-1);
    if (last && last[0] === kind) last[1] += text;
    else found.push([kind, text]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { add(" ", a[i]); i++; j++; }
    else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) add("-", a[i++]);
    else add("+", b[j++]);
  }
  return found;
}

function marked(reference, answer) {
  const paragraph = element("p");
  for (const [kind, text] of difference(reference, answer) ?? [[" ", answer]]) {
    paragraph.append(element({ " ": "span", "-": "del", "+": "ins" }[kind], text));
  }
  return paragraph;
}

function box(title, paragraph, { className = "", aside = "" } = {}) {
  const made = element("div", undefined, `text ${className}`);
  const head = element("h4");
  head.append(element("span", title), element("span", aside));
  made.append(head, paragraph);
  return made;
}

function showAnswer(cell, index, part, { reference, isOneBase }) {
  const [number, score, isCut] = cell.answers[index];
  const answer = part.texts[number];
  const isSame = answer.trim() === reference.trim();
  const shown = answer.trim() && !isSame ? marked(reference, answer) : element("p", isSame ? answer : undefined);
  if (!answer.trim()) shown.append(element("em", word("empty answer")));
  if (isCut) shown.append(element("em", ` ${word("the token limit cut it off")}`));
  const title = isOneBase ? cell.method : `${cell.model} · ${cell.method}`;
  return box(title, shown, { className: isSame ? "same" : "", aside: isSame ? `= ${score.toFixed(1)}` : score.toFixed(1) });
}

function showRow(part, index, cells) {
  const asked = part.rows[index];
  const [prompt, reference] = asked.texts.map((number) => part.texts[number]);
  const [made, question, answers] = [element("article", undefined, "row"), element("div"), element("div", undefined, "answers")];
  question.append(box(word("Prompt"), element("p", prompt)));
  question.append(box(word("Reference"), element("p", reference), { className: "reference" }));
  const isOneBase = unique(cells.map((cell) => cell.model)).length === 1;
  const given = cells.filter((cell) => cell.answers[index]);
  answers.append(...given.map((cell) => showAnswer(cell, index, part, { reference, isOneBase })));
  const texts = element("div", undefined, "texts");
  texts.append(question, answers);
  made.append(element("h3", asked.id), texts);
  return made;
}

function spread(cells, index) {
  const scores = cells.map((cell) => cell.answers[index]?.[1]).filter((score) => score !== undefined);
  return scores.length ? Math.max(...scores) - Math.min(...scores) : 0;
}

function matching(part, cells) {
  const wanted = $("browse-find").value.trim().toLowerCase();
  const order = $("browse-order").value;
  const all = [...part.rows.keys()];
  let chosen = all.filter((index) => order === "methods disagree" || part.rows[index].random === (order === "random rows"));
  if (order === "methods disagree") chosen.sort((a, b) => spread(cells, b) - spread(cells, a));
  if (wanted) {
    const holds = (number) => part.texts[number].toLowerCase().includes(wanted);
    chosen = chosen.filter((index) =>
      part.rows[index].texts.some(holds) || cells.some((cell) => cell.answers[index] && holds(cell.answers[index][0])));
  }
  return chosen;
}

function showMethods(cells) {
  const boxes = unique(cells.map((cell) => cell.method)).map((method) => {
    const label = element("label");
    const input = element("input");
    input.type = "checkbox";
    input.checked = !browse.hidden.has(method);
    input.addEventListener("change", () => {
      if (input.checked) browse.hidden.delete(method);
      else browse.hidden.add(method);
      showRows();
    });
    label.append(input, ` ${method}`);
    return label;
  });
  $("browse-methods").replaceChildren(...boxes);
}

function showRows() {
  const names = rows.map((each) => `${each.task} / ${each.part}`);
  fill("browse-part", names, { label: (name) => name });
  const part = rows[names.indexOf($("browse-part").value)] ?? { rows: [], cells: [], texts: [] };
  fill("browse-model", [...unique(part.cells.map((cell) => cell.model)), "all"]);
  const orders = part.rows.some((row) => row.random) ? ["worst first", "methods disagree", "random rows"] : ["worst first", "methods disagree"];
  fill("browse-order", orders);
  const model = $("browse-model").value;
  const ofBase = part.cells.filter((cell) => model === "all" || cell.model === model);
  showMethods(ofBase);
  const cells = ofBase.filter((cell) => !browse.hidden.has(cell.method));
  const found = matching(part, cells);
  const numPages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
  browse.page = Math.min(browse.page, numPages - 1);
  const first = browse.page * PAGE_ROWS;
  const shown = found.slice(first, first + PAGE_ROWS).map((index) => showRow(part, index, cells));
  $("rows").replaceChildren(...(shown.length ? shown : [element("p", word("no rows"), "quiet")]));
  $("browse-page").textContent = `${browse.page + 1} / ${numPages} (${found.length})`;
  $("browse-previous").disabled = browse.page === 0;
  $("browse-next").disabled = browse.page >= numPages - 1;
}

// ---- the page ----

function remember(name, value) {
  try { localStorage.setItem(`finetune-${name}`, value); } catch { /* pages from a disk may have no storage */ }
}

function remembered(name) {
  try { return localStorage.getItem(`finetune-${name}`); } catch { return null; }
}

async function drawAll() {
  delete root.dataset.ready;
  root.lang = root.dataset.language === "zh" ? "zh-CN" : "en";
  for (const option of $("theme").options) option.textContent = word(option.value);
  const names = data.tasks.map((each) => each.name);
  for (const id of ["matrix-task", "cost-task"]) fill(id, names);
  fill("interval-task", unique(data.comparisons.map((each) => each.task)));
  fill("loss-task", unique(data.curves.map((each) => each.task)));
  showRows();
  await Promise.all([drawMatrix(), drawIntervals(), drawCosts(), drawLosses()]);
  root.dataset.ready = "yes";
}

async function start() {
  root.dataset.theme = remembered("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.language = remembered("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
  [data, rows] = await Promise.all([unpack("data"), unpack("browser")]);
  for (const name of ["theme", "language"]) {
    $(name).value = root.dataset[name];
    $(name).addEventListener("change", () => {
      root.dataset[name] = $(name).value;
      remember(name, $(name).value);
      drawAll();
    });
  }
  const figures = { matrix: drawMatrix, interval: drawIntervals, cost: drawCosts, loss: drawLosses };
  for (const select of document.querySelectorAll("main select")) {
    const drawn = figures[select.id.split("-")[0]];
    select.addEventListener("change", drawn ?? (() => { browse.page = 0; showRows(); }));
  }
  $("browse-find").addEventListener("input", () => { browse.page = 0; showRows(); });
  $("browse-previous").addEventListener("click", () => { browse.page--; showRows(); });
  $("browse-next").addEventListener("click", () => { browse.page++; showRows(); });
  await drawAll();
}

start();
