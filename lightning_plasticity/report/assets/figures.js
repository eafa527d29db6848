"use strict";
// Draws the figures and tables from the JSON in the page, in the colours of the theme.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const COLOURS = {
    light: ["#0b62a4", "#c2410c", "#117a3d", "#7c3aed", "#b0126b", "#8a5a00", "#0e7490", "#4a4a4a", "#ef5da8", "#4d7c0f", "#00a3a3", "#a16207"],
    dark: ["#6cb6ff", "#ff9e64", "#5bd18b", "#b69cff", "#ff7ac6", "#e3b341", "#4fd1d9", "#c9c9c9", "#ff8087", "#b5d94a", "#7df0d8", "#d0a86b"],
  };
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const INK = { light: ["#1f2328", "#d0d4da", "#ffffff", "#707780"], dark: ["#e6e8eb", "#3a4149", "#16191d", "#9aa2ab"] };
  const PAPER = [660, 250]; // of a figure on paper, in CSS pixels: A4 and Letter have more
  const hidden = new Set();
  const groups = data.groups.map((group) => group.name);
  let printing = false;

  const theme = () => (dark.matches && !printing ? "dark" : "light");
  const colour = (name) => COLOURS[theme()][Math.max(groups.indexOf(name), 0) % COLOURS.light.length];
  const symbol = (name) => SYMBOLS[Math.max(groups.indexOf(name), 0) % SYMBOLS.length];
  const faint = (hex) => hex + "2e";
  const known = (x) => typeof x === "number";
  // Plotly reads a little HTML in its labels; names are text.
  const text = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const full = (line) => (line.variant ? `${line.group} (${line.variant})` : line.group);
  const number = (x) => (x === null || x === undefined ? "–" : known(x) ? String(Number(x.toPrecision(4))) : x);

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function layout(yTitle, log) {
    const [ink, grid, paper] = INK[theme()];
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, ticks: "outside", tickcolor: grid };
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: printing ? 11 : 13 },
      margin: { l: 8, r: 12, t: 14, b: 8 },
      showlegend: false,
      hovermode: "closest",
      hoverlabel: { namelength: -1, bgcolor: paper, bordercolor: grid, font: { color: ink } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      xaxis: { ...axis, title: { text: "task" }, tickformat: "d", ...fewTicks() },
      yaxis: { ...axis, title: { text: text(yTitle), ...(printing ? { font: { size: 11 } } : {}) }, ...(log ? { type: "log", dtick: 1, exponentformat: "power" } : { rangemode: "tozero" }) },
    };
  }

  const lastTask = Math.max(0, ...data.sections.flatMap((s) => s.options.flatMap((o) => o.lines.flatMap((l) => l.tasks))), ...data.heat.flatMap((m) => m.tasks));
  function fewTicks() {
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((s) => lastTask / s <= 12) || Math.ceil(lastTask / 10);
    return { dtick: step, tick0: 0, range: [-0.5, lastTask + 0.5] };
  }

  const tasks = (line) => line.tasks;

  // One line: its band (several runs) or intervals (one run), and what is known only from one side.
  function traces(line, dash) {
    const c = colour(line.group);
    const x = tasks(line);
    const y = line.value.map((v) => (known(v) ? v : null));
    const name = text(full(line));
    const drawn = [];
    const both = line.lower ? x.map((_, k) => k).filter((k) => known(line.lower[k]) && known(line.upper[k]) && line.lower[k] < line.upper[k]) : [];
    if (line.runs && both.length > 1) {
      const edge = { x: both.map((k) => x[k]), mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      drawn.push({ ...edge, y: both.map((k) => line.lower[k]) }, { ...edge, y: both.map((k) => line.upper[k]), fill: "tonexty", fillcolor: faint(c) });
    } else if (both.length) {
      drawn.push({
        x: both.flatMap((k) => [x[k], x[k], null]),
        y: both.flatMap((k) => [line.lower[k], line.upper[k], null]),
        mode: "lines", line: { width: 3, color: c }, opacity: 0.55, hoverinfo: "skip",
      });
    }
    const more = line.lower ? x.map((_, k) => k).filter((k) => y[k] === null && known(line.lower[k]) && line.upper[k] === "inf") : [];
    if (more.length) {
      drawn.push({
        x: more.map((k) => x[k]), y: more.map((k) => line.lower[k]), mode: "markers", name,
        marker: { symbol: "triangle-up-open", size: 10, color: c }, hovertemplate: "task %{x}: at least %{y:.4~g}",
      });
    }
    drawn.push({
      x, y, name, mode: x.length > 60 ? "lines" : "lines+markers", line: { color: c, width: 1.8, dash: DASHES[dash % DASHES.length] },
      marker: { symbol: symbol(line.group), size: 5, color: c },
      hovertemplate: "task %{x}: %{y:.4~g}",
      ...(y.filter(known).length === 1 ? { mode: "markers" } : {}),
    });
    return drawn;
  }

  function alertMarks() {
    const marks = [];
    groups.forEach((group) => {
      if (hidden.has(group)) return;
      const found = data.alerts.filter((alert) => alert.group === group).flatMap((alert) => alert.tasks.filter((_, k) => alert.active[k]).map((task) => [task, alert.measure]));
      if (found.length) {
        marks.push({
          x: found.map((one) => one[0]), y: found.map(() => 1), text: found.map((one) => text(one[1])), yaxis: "y2", mode: "markers", name: text(group), cliponaxis: false,
          marker: { symbol: "triangle-down", size: 9, color: colour(group) }, hovertemplate: "task %{x}: alert on %{text}",
        });
      }
    });
    return marks;
  }

  const variants = (lines) => [...new Set(lines.map((line) => line.variant))];
  const shown = (lines) => lines.filter((line) => !hidden.has(line.group));

  const capStyle = () => ({ mode: "lines", line: { color: INK[theme()][3], width: 1.5, dash: "dot" }, hovertemplate: "task %{x}: cap %{y:.4~g}" });

  // At the tasks where all that is shown has one cap.
  function commonCap(lines) {
    const x = [...new Set(lines.flatMap((line) => line.tasks))].sort((a, b) => a - b);
    const y = x.map((task) => {
      const found = new Set(lines.filter((line) => line.tasks.includes(task)).map((line) => line.value[line.tasks.indexOf(task)]));
      return found.size === 1 ? [...found][0] : null;
    });
    return y.some(known) ? [{ x, y, ...capStyle(), name: "cap" }] : [];
  }

  function drawOption(place, option) {
    const lines = shown(option.lines);
    const of = variants(option.lines);
    const marks = alertMarks();
    const plan = layout(option.label, option.log);
    if (marks.length) plan.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
    const caps = shown(option.cap || []).map((line) => ({
      x: tasks(line), y: line.value, name: text(full(line)), ...capStyle(),
    }));
    plot(place, [...caps, ...commonCap(shown(option.common_cap || [])), ...lines.flatMap((line) => traces(line, of.indexOf(line.variant))), ...marks], plan, option.label);
    legend(place, lines, of);
  }

  function drawLogged(place, series) {
    const lines = shown(series.lines);
    const plan = layout(series.label, false);
    plan.xaxis = { ...plan.xaxis, title: { text: "step" }, dtick: undefined, range: undefined, tickformat: "~s", nticks: 8 };
    plan.yaxis.rangemode = "normal";
    plan.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
    const starts = {
      x: series.starts.flatMap((x) => [x, x, null]), y: series.starts.flatMap(() => [0, 1, null]), yaxis: "y2", mode: "lines",
      line: { color: INK[theme()][1], width: 1, dash: "dot" }, hoverinfo: "skip",
    };
    plot(place, [starts, ...lines.map((line) => ({
      x: line.steps, y: line.value, mode: line.steps.length > 60 ? "lines" : "lines+markers", name: text(line.run),
      line: { color: colour(line.group), width: 1.4 }, marker: { size: 4, symbol: symbol(line.group) }, hovertemplate: "step %{x}: %{y:.4~g}",
    }))], plan, series.label);
    legend(place, lines, [""]);
  }

  function drawAlert(place) {
    const alerts = shown(data.alerts);
    const measures = [...new Set(data.alerts.map((alert) => alert.measure))];
    const plan = layout("value / reference", false);
    plan.yaxis.rangemode = "normal";
    const limits = [...new Set(alerts.map((alert) => alert.fraction).filter(known))];
    plan.shapes = limits.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: INK[theme()][3], dash: "dot", width: 1.5 } }));
    plot(place, alerts.map((alert) => ({
      x: tasks(alert), y: alert.ratio.map((v) => (known(v) ? v : null)), name: text(`${alert.run}: ${alert.measure}, against ${alert.against}`), mode: "lines+markers",
      line: { color: colour(alert.group), width: 1.8, dash: DASHES[measures.indexOf(alert.measure) % DASHES.length] },
      marker: { color: colour(alert.group), size: alert.active.map((on) => (on ? 12 : 5)), symbol: alert.active.map((on) => (on ? "triangle-down" : symbol(alert.group))) },
      hovertemplate: "task %{x}: %{y:.4~g}",
    })), plan, "Alerts");
    legend(place, alerts, measures);
  }

  const peak = (matrix) => Math.max(1, ...data.heat.filter((one) => one.matrix === matrix).flatMap((one) => one.counts.flat()));

  function drawHeat(place, [map, negative]) {
    const [ink] = INK[theme()];
    const counts = negative ? map.negative : map.counts;
    const bins = (counts[0] || []).length;
    const y = Array.from({ length: bins }, (_, k) => map.from + (k + 0.5) * map.step);
    const top = Math.log10(peak(map.matrix));
    const ticks = [0, 1, 2, 3, 4, 5, 6, 7, 8].filter((t) => t <= top);
    const plan = layout("", false);
    plan.yaxis = { ...plan.yaxis, rangemode: "normal", showgrid: false, title: { text: negative ? "eigenvalue (negative)" : "|eigenvalue|" }, range: [map.from, map.from + bins * map.step] };
    const decades = Array.from({ length: 40 }, (_, k) => k - 20).filter((d) => d >= map.from && d <= map.from + bins * map.step);
    const few = decades.filter((_, k) => decades.length < 9 || k % 2 === 0);
    plan.yaxis.tickvals = few;
    plan.yaxis.ticktext = few.map((d) => `${negative ? "−" : ""}10<sup>${String(d).replace("-", "−")}</sup>`);
    plan.xaxis.showgrid = false;
    plan.shapes = (data.eps[map.matrix] || []).map((eps) => Math.log10(eps)).filter((e) => e > map.from && e < map.from + bins * map.step).map((e) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: e, y1: e, line: { color: "#f43f5e", width: 1.5, dash: "dot" },
    }));
    const z = y.map((_, b) => counts.map((column) => (column[b] > 0 ? Math.log10(column[b]) : null)));
    const label = y.map((middle, b) => counts.map((column) => `${(10 ** (middle - map.step / 2)).toPrecision(2)} to ${(10 ** (middle + map.step / 2)).toPrecision(2)}: ${number(column[b])}`));
    plot(place, [{
      type: "heatmap", x: tasks(map), y, z, text: label, hoverongaps: false, hovertemplate: "task %{x}, %{text} eigenvalues<extra></extra>",
      zmin: Math.min(0, top), zmax: Math.max(top, 1), colorscale: "Viridis", reversescale: theme() === "light",
      colorbar: { thickness: 10, outlinewidth: 0, title: { text: "count", side: "top" }, tickvals: ticks, ticktext: ticks.map((t) => String(10 ** t)), tickfont: { color: ink } },
    }], plan, `Spectrum of ${map.run}`);
    const zeros = map.zeros.map((zero, k) => zero + map.rounding[k]);
    const span = Math.min(...zeros) === Math.max(...zeros) ? number(zeros[0]) : `${number(Math.min(...zeros))} to ${number(Math.max(...zeros))}`;
    const kind = map.exact.every(Boolean) ? "Exact spectra" : "Estimates";
    place.parentNode.querySelector(".legend").replaceChildren(`${kind} on ${[...new Set(map.samples)].join(", ")} samples; ${span} of ${[...new Set(map.params)].join(", ")} eigenvalues are zero or within rounding of it.`);
  }

  function plot(place, drawn, plan, label) {
    place.setAttribute("aria-label", `Figure: ${label}. The table below holds its numbers.`);
    const size = printing ? { autosize: false, width: PAPER[0], height: PAPER[1] } : { autosize: true };
    Plotly.react(place, drawn, { ...plan, ...size }, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"], displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false });
  }

  function legend(place, lines, of) {
    const box = place.parentNode.querySelector(".legend");
    const several = of.length > 1;
    const names = [...new Set(lines.map((line) => line.group))];
    box.replaceChildren(...names.map((name) => {
      const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = colour(name);
      return element("span", { class: "chip" }, swatch, name);
    }));
    if (several) box.append(element("span", { class: "chip" }, of.map((variant, k) => `${DASHES[k % DASHES.length]}: ${variant || "start of task"}`).join("; ")));
  }

  function cells(line, k) {
    if (k < 0) return "";
    const interval = line.lower && (line.lower[k] !== line.value[k] || line.upper[k] !== line.value[k]) && (line.lower[k] !== null || line.upper[k] !== null);
    return number(line.value[k]) + (interval ? ` [${number(line.lower[k])}, ${number(line.upper[k])}]` : "") + (line.runs ? ` (${line.runs[k]})` : "");
  }

  function table(heads, rows) {
    return element("table", {},
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, ...rows.map(([first, ...rest]) => element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((cell) => element("td", {}, cell))))));
  }

  function lineTable(lines) {
    const all = [...new Set(lines.flatMap((line) => line.tasks))].sort((a, b) => a - b);
    return table(["task", ...lines.map(full)], all.map((task) => [String(task), ...lines.map((line) => cells(line, line.tasks.indexOf(task)))]));
  }

  function heatTable([map]) {
    return table(["task", "parameters", "samples", "exactly zero", "within rounding", "below the figure", "in the figure"],
      map.tasks.map((task, k) => [String(task), ...[map.params[k], map.samples[k], map.zeros[k], map.rounding[k], map.below[k], map.counts[k].reduce((a, b) => a + b, 0)].map(number)]));
  }

  // plotly.js stands in the page as plain text: it is run once the text of the page is on the screen, or to print.
  function ready() {
    if (!window.Plotly) document.head.append(element("script", {}, document.getElementById("plotly").textContent));
  }

  // Each figure: its place, the choice, and how to draw and tabulate what is chosen.
  const figures = new Map();
  function add(panel, options, draw, tabulate) {
    const place = panel.querySelector(".figure");
    const select = panel.querySelector("select");
    const details = panel.querySelector("details");
    const figure = { seen: false };
    const chosen = () => options[select ? select.selectedIndex : 0];
    figure.draw = () => {
      figure.seen = true;
      draw(place, chosen());
    };
    const fill = () => details.open && details.querySelector(".scroll").replaceChildren(tabulate(chosen()));
    figure.update = () => {
      if (figure.seen) figure.draw();
      fill();
    };
    if (select) select.addEventListener("change", figure.update);
    details.addEventListener("toggle", fill);
    figures.set(place, figure);
  }

  for (const section of data.sections) {
    add(document.querySelector(`#${section.key} .panel`), section.options, drawOption, (option) => lineTable(shown(option.lines)));
  }
  const maps = data.heat.flatMap((map) => (map.negative ? [[map, false], [map, true]] : [[map, false]]));
  document.querySelectorAll("#spectra .panel").forEach((panel) => add(panel, maps, drawHeat, heatTable));
  if (data.logged.length) {
    add(document.querySelector("#logged .panel"), data.logged, drawLogged, (series) => table(["run", "step", series.label],
      shown(series.lines).flatMap((line) => line.steps.map((step, k) => [line.run, number(step), number(line.value[k])]))));
  }
  if (data.alerts.length) {
    add(document.querySelector("#alerts .panel"), [null], drawAlert, () => table(["task", "run", "measure", "against", "value / reference", "sounds"],
      shown(data.alerts).flatMap((alert) => alert.tasks.map((task, k) => [String(task), alert.run, alert.measure, alert.against, number(alert.ratio[k]), alert.active[k] ? "yes" : "no"]))));
  }
  document.querySelectorAll("#runs input").forEach((box) => {
    const swatch = box.parentNode.querySelector(".swatch");
    const paint = () => { swatch.style.background = colour(box.value); };
    paint();
    dark.addEventListener("change", paint);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(box.value); else hidden.add(box.value);
      figures.forEach((figure) => figure.update());
    });
  });
  dark.addEventListener("change", () => figures.forEach((figure) => figure.update()));

  // What is on the screen comes first, then the rest in the order of the page, one at a time.
  const idle = (run) => (window.requestIdleCallback ? requestIdleCallback(run, { timeout: 200 }) : setTimeout(run, 20));
  function rest() {
    const figure = [...figures.values()].find((one) => !one.seen);
    if (!figure) return;
    figure.draw();
    idle(rest);
  }
  let begun = false;
  function begin() {
    if (begun) return;
    begun = true;
    ready();
    const watch = new IntersectionObserver((entries) => {
      entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
        watch.unobserve(entry.target);
        const figure = figures.get(entry.target);
        if (!figure.seen) figure.draw();
      });
    });
    figures.forEach((_, place) => watch.observe(place));
    setTimeout(() => idle(rest));
  }
  requestAnimationFrame(() => setTimeout(begin));
  setTimeout(begin, 400); // a page in a background tab has no frames

  function print(on) {
    ready();
    printing = on;
    document.querySelectorAll("#provenance details").forEach((one) => { one.open = on; });
    figures.forEach((figure) => figure.draw());
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
})();
