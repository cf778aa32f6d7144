// Draws the charts of the report: panels in groups, and projections with a slider over the layers.
// It loads nothing: plotly stands compressed in the page. Without scripts the page shows its figures instead.
"use strict";

(async () => {
  const read = (id) => document.getElementById(id).textContent;
  const charts = JSON.parse(read("charts"));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const redraw = [];

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);

  async function loadPlotly() {
    const stream = new Blob([bytes(read("plotly"))]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  // "@probe" and "@probe:0.2" are names of colours
  function resolve(spec) {
    if (Array.isArray(spec)) return spec.map(resolve);
    if (spec && typeof spec === "object") {
      return Object.fromEntries(Object.entries(spec).map(([key, value]) => [key, resolve(value)]));
    }
    if (typeof spec !== "string" || !spec.startsWith("@")) return spec;
    const [name, alpha] = spec.slice(1).split(":");
    const colour = charts.palette[name][dark.matches ? 1 : 0];
    if (!alpha) return colour;
    const channel = (at) => parseInt(colour.slice(at, at + 2), 16);
    return `rgba(${channel(1)},${channel(3)},${channel(5)},${alpha})`;
  }

  function plot(element, data, layout) {
    const chosen = resolve(layout);
    // on a phone a finger scrolls the page, not the chart
    if (narrow.matches) Object.assign(chosen, { dragmode: false, height: Math.min(chosen.height, 380) });
    return Plotly.react(element, resolve(data), chosen, {
      responsive: true,
      displayModeBar: false,
    });
  }

  function make(tag, parent, properties) {
    const element = Object.assign(document.createElement(tag), properties);
    parent.append(element);
    return element;
  }

  function choice(parent, label, names, onChange) {
    if (names.length < 2) return null;
    const field = make("label", parent, { textContent: `${label} ` });
    const select = make("select", field, {});
    names.forEach((name, value) => make("option", select, { textContent: name, value }));
    select.addEventListener("change", () => onChange(Number(select.value)));
    return select;
  }

  function legend(parent, entries) {
    parent.replaceChildren();
    const swatch = (className, name, text) => {
      const item = make("span", parent, { className: "entry" });
      make("i", item, { className }).style.setProperty("--c", resolve(name));
      item.append(text);
    };
    for (const entry of entries) {
      swatch(`stroke ${entry.dash}`, `@${entry.colour}`, entry.name);
    }
    const bands = entries.length ? entries.find((entry) => entry.bands.length) : null;
    if (bands) bands.bands.forEach((band) => swatch("band", `@${bands.colour}:${2 * band.alpha}`, band.name));
  }

  function drawGroup(section, group) {
    const controls = make("div", section, { className: "controls" });
    const key = make("div", section, { className: "legend" });
    const grid = make("div", section, { className: "panels" });
    let current = 0;
    const show = (at) => {
      current = at;
      const option = group.options[at];
      legend(key, option.legend);
      grid.querySelectorAll(".chart").forEach((element) => Plotly.purge(element));
      grid.replaceChildren();
      grid.classList.toggle("single", option.panels.length === 1);
      grid.classList.toggle("pairs", option.panels.length === 4);
      const elements = option.panels.map((panel) => {
        const box = make("div", grid, { className: "panel" });
        make("h3", box, { textContent: panel.title });
        const element = make("div", box, { className: "chart" });
        element.setAttribute("role", "img");
        element.setAttribute("aria-label", `${option.name} ${panel.title}`);
        return element;
      });
      // only when all of them stand there is their width known
      option.panels.forEach((panel, k) => plot(elements[k], panel.data, panel.layout));
    };
    choice(controls, group.label, group.options.map((option) => option.name), show);
    show(0);
    redraw.push(() => show(current));
  }

  function drawProjections(section, all) {
    const controls = make("div", section, { className: "controls" });
    let map = all.first;
    const select = choice(controls, "Projection", all.maps.map((entry) => entry.name), (at) => {
      map = at;
      start();
      show();
    });
    if (select) select.value = String(map);
    const field = make("label", controls, { className: "slide", textContent: "Layer " });
    const slider = make("input", field, { type: "range", min: 0, step: 1, id: "layer-slider" });
    const output = make("output", controls, { id: "layer-name" });
    const key = make("div", section, { className: "legend" });
    const box = make("div", section, { className: "panel" });
    const element = make("div", box, { className: "chart", id: "projection" });
    element.setAttribute("role", "img");

    function start() {
      const layers = all.maps[map].layers;
      slider.max = layers.length - 1;
      field.hidden = layers.length < 2;
      const best = layers.findIndex((entry) => entry.layer === charts.best);
      slider.value = best < 0 ? layers.length - 1 : best;
    }
    function show() {
      const entry = all.maps[map].layers[Number(slider.value)];
      output.textContent = [entry.name, entry.score].filter(Boolean).join(", ");
      element.setAttribute("aria-label", `${all.maps[map].name}, ${entry.name}`);
      slider.setAttribute("aria-valuetext", entry.name);
      const x = floats(entry.x);
      const y = floats(entry.y);
      const data = all.classes.map((name, k) => {
        const here = all.y.flatMap((c, index) => (c === k ? [index] : []));
        return {
          type: "scatter",
          mode: "markers",
          name,
          x: here.map((index) => x[index]),
          y: here.map((index) => y[index]),
          text: here.map((index) => all.samples[index]),
          hovertemplate: "%{text}<extra>%{fullData.name}</extra>",
          marker: { color: all.colours[k], symbol: all.symbols[k], size: 6, opacity: 0.65, line: { width: 0 } },
        };
      });
      const layout = structuredClone(all.layout);
      layout.xaxis.title.text = entry.axes[0] || "";
      layout.yaxis.title.text = entry.axes[1] || "";
      plot(element, data, layout);
    }
    const paint = () => {
      legend(key, []);
      all.names.forEach((name, k) => {
        const item = make("span", key, { className: "entry" });
        make("i", item, { className: "point" }).style.setProperty("--c", resolve(all.colours[k]));
        item.append(name);
      });
      show();
    };
    slider.addEventListener("input", show);
    start();
    paint();
    redraw.push(paint);
  }

  await loadPlotly();
  document.documentElement.classList.add("live");
  for (const section of document.querySelectorAll("[data-group]")) {
    drawGroup(section, charts.groups[section.dataset.group]);
  }
  const section = document.querySelector("[data-projections]");
  if (section) drawProjections(section, charts.projections);
  dark.addEventListener("change", () => redraw.forEach((paint) => paint()));
  narrow.addEventListener("change", () => redraw.forEach((paint) => paint()));
  document.documentElement.dataset.ready = "yes";
})();
