"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  // A custom property reads as it is written; on an element it reads as the colour of the scheme.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
  const number = (value) => (value == null ? "–" : Number(value.toPrecision(4)).toString().replace("-", "−"));
  const tip = () => ({ fill: colour("paper"), stroke: colour("line"), textPadding: 9, fontSize: 12, lineHeight: 1.35 });
  const layerTicks = (layers, width) => {
    const step = Math.max(1, Math.ceil(layers.length / (width / 26)));
    return layers.filter((_, index) => index % step === 0);
  };
  const unique = (values) => [...new Set(values)];

  const powers = (values) => {
    const ends = [Math.min(...values), Math.max(...values)].map(Math.log10);
    const [low, high] = [Math.floor(ends[0]), Math.ceil(ends[1])];
    return Array.from({ length: high - low + 1 }, (_, index) => Number(`1e${low + index}`));
  };

  const charts = {};

  const byLayer = (key, label, extra, shown = (row) => number(row[key])) => (width) => {
    const rows = data.quality.filter((row) => row[key] != null);
    if (!rows.length) return null;
    const layers = rows.map((row) => row.layer);
    const best = rows.filter((row) => row.layer === data.best);
    return Plot.plot({
      width, height: 170, marginLeft: 44, marginBottom: 32, marginTop: 14,
      x: { label: "layer", ticks: layerTicks(layers, width), tickFormat: "d", labelAnchor: "right", inset: 6 },
      y: { label: null, grid: true, ticks: 4, nice: true, ...extra },
      marks: [
        Plot.ruleX(best, { x: "layer", stroke: colour("line") }),
        Plot.lineY(rows, { x: "layer", y: key, stroke: colour("accent"), strokeWidth: 1.75 }),
        Plot.dot(rows, { x: "layer", y: key, r: rows.length > 40 ? 1.5 : 2.5, fill: colour("accent") }),
        Plot.dot(best, { x: "layer", y: key, r: 5, fill: colour("accent"), stroke: colour("paper"), strokeWidth: 1.5 }),
        Plot.tip(rows, Plot.pointerX({ x: "layer", y: key, maxRadius: Infinity, title: (row) => `layer ${row.layer}\n${label} ${shown(row)}`, ...tip() })),
      ],
    });
  };

  if (data.quality) {
    charts.signal = byLayer("signal", "signal to noise", { zero: true });
    charts.auc = byLayer("auc", "AUC", { domain: [Math.min(0.5, ...data.quality.map((row) => row.auc ?? 1)), 1] });
    charts.purity = byLayer("purity", "purity", { domain: [0, 1] });
    data.quality.forEach((row) => { row.apart = Math.max(1e-9, 1 - row.cosine); });
    charts.cosine = byLayer("apart", "cosine", { type: "log", ticks: powers(data.quality.map((row) => row.apart)), tickFormat: String },
      (row) => row.cosine.toFixed(4).replace("-", "−"));
  }

  if (data.cosines) {
    charts.cosines = (width) => {
      const { layers, values } = data.cosines;
      const side = Math.min(width, 460);
      const cells = layers.flatMap((y, row) => layers.slice(0, row + 1).map((x, column) => ({ x, y, value: values[row][column] })));
      const written = side / layers.length > 38;
      const plot = Plot.plot({
        width: side, height: side - 10, marginLeft: 34, marginBottom: 34, marginTop: 6, marginRight: 6, padding: layers.length > 24 ? 0 : 0.06,
        x: { label: "layer", ticks: layerTicks(layers, side), tickSize: 0 },
        y: { label: null, ticks: layerTicks(layers, side), tickSize: 0 },
        color: { type: "diverging", domain: [-1, 1], pivot: 0, symmetric: false, range: [colour("slanted-fill"), colour("low"), colour("high")] },
        marks: [
          Plot.cell(cells, { x: "x", y: "y", fill: "value" }),
          ...(written ? [Plot.text(cells, { x: "x", y: "y", text: (cell) => cell.value.toFixed(2).replace("-", "−"), fill: (cell) => (Math.abs(cell.value) > 0.68 ? colour("paper") : colour("ink")), fontSize: 10.5 })] : []),
          Plot.tip(cells, Plot.pointer({ x: "x", y: "y", maxRadius: Infinity, title: (cell) => `layers ${cell.x} and ${cell.y}\ncosine ${cell.value.toFixed(3).replace("-", "−")}`, ...tip() })),
        ],
      });
      return [plot, ...(written ? [] : [ramp(["−1", "0", "1"], ["slanted-fill", "low", "high"])])];
    };
  }

  if (data.projection) {
    const slider = at("layer");
    const known = new Map((data.quality ?? []).map((row) => [row.layer, row]));
    const start = data.projection.findIndex((each) => each.layer === data.best);
    slider.value = start < 0 ? data.projection.length - 1 : start;
    const tell = () => {
      const each = data.projection[slider.value];
      const row = known.get(each.layer);
      const words = [`layer ${each.layer}`];
      if (row?.auc != null) words.push(`AUC ${row.auc.toFixed(3)}`);
      if (row?.signal != null) words.push(`signal to noise ${number(row.signal)}`);
      at("layer-told").textContent = words.join(" · ");
      slider.setAttribute("aria-valuetext", words.join(", "));
    };
    charts.projection = (width) => {
      const each = data.projection[slider.value];
      const points = ["positive", "negative"].flatMap((kind) => each[kind].map(([x, y], prompt) => ({ kind, x, y, prompt })));
      return Plot.plot({
        width, height: Math.min(400, Math.max(260, width * 0.8)), marginLeft: 44, marginBottom: 36, marginTop: 22, inset: 10,
        x: { label: "along the direction →", labelAnchor: "right", nice: true, grid: true, ticks: 5 },
        y: { label: `↑ principal component of the rest (${Math.round(100 * each.share)} % of its variance)`, nice: true, grid: true, ticks: 5 },
        color: { domain: ["positive", "negative"], range: [colour("slanted-fill"), colour("neutral-fill")] },
        symbol: { domain: ["positive", "negative"], range: ["circle", "diamond"] },
        marks: [
          Plot.dot(points, { x: "x", y: "y", fill: "kind", symbol: "kind", r: 4, fillOpacity: 0.8, stroke: colour("paper"), strokeWidth: 0.6 }),
          Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: (point) => `${point.kind} prompt\nalong ${number(point.x)}, across ${number(point.y)}`, ...tip() })),
        ],
      });
    };
    slider.addEventListener("input", () => { tell(); draw("projection"); });
    tell();
  }

  const components = (rows) => {
    const order = ["embedding", "attention", "mlp"];
    const place = (name) => (order.findIndex((each) => name.startsWith(each)) + order.length + 1) % (order.length + 1);
    return unique(rows.map((row) => row.component)).sort((one, other) => place(one) - place(other) || (one < other ? -1 : 1));
  };

  const tensors = (cell) => (cell.count > 1 ? ` (${cell.count} tensors)` : "");
  const map = (cells, width, facets, title) => {
    const rows = components(cells);
    const layers = unique(cells.map((cell) => cell.layer)).sort((one, other) => one - other);
    const most = Math.max(...cells.map((cell) => cell.value)) || 1;
    const written = (width - 150) / layers.length > 40;
    const across = { x: "layer", y: "component", ...(facets ? { fy: "when" } : {}) };
    const plot = Plot.plot({
      width, height: 60 + (facets ? 2 : 1) * rows.length * 34 + 16, marginLeft: Math.min(110, 40 + 7 * Math.max(...rows.map((row) => row.length))), marginRight: facets ? 52 : 8, marginBottom: 32, marginTop: 6,
      padding: 0.08,
      x: { label: "layer", ticks: layerTicks(layers, width - 150), tickSize: 0, domain: layers },
      y: { label: null, domain: rows, tickSize: 0 },
      ...(facets ? { fy: { domain: facets, label: null, padding: 0.12 } } : {}),
      color: { type: "linear", domain: [0, most], range: [colour("low"), colour("high")] },
      marks: [
        Plot.cell(cells, { ...across, fill: "value", rx: 2 }),
        ...(written ? [Plot.text(cells, { ...across, text: (cell) => percent(cell.value), fill: (cell) => (cell.value > 0.68 * most ? colour("paper") : colour("ink")), fontSize: 11 })] : []),
        Plot.tip(cells, Plot.pointer({ ...across, maxRadius: Infinity, title, ...tip() })),
      ],
    });
    return [plot, ...(written ? [] : [ramp([percent(0, 0), percent(most)], ["low", "high"])])];
  };
  const ramp = (ends, colours) => {
    const box = document.createElement("p");
    box.className = "key ramp";
    const strip = document.createElement("span");
    strip.className = "strip";
    strip.style.background = `linear-gradient(to right, ${colours.map((name) => colour(name)).join(", ")})`;
    const words = ends.map((end) => Object.assign(document.createElement("span"), { textContent: end }));
    strip.append(...words);
    box.append(strip);
    return box;
  };

  if (data.edits) {
    const cells = data.edits.flatMap((cell) => ["before", "after"].map((when) => ({ ...cell, when, value: cell[when] })));
    charts.edits = (width) => map(cells, width, ["before", "after"], (cell) => `layer ${cell.layer}, ${cell.names}${tensors(cell)}\nbefore ${percent(cell.before, 3)}\nafter ${percent(cell.after, 3)}`);
    charts.drift = (width) => {
      const rows = data.edits.filter((cell) => cell.drift != null);
      if (!rows.length) return "No norms were to be kept.";
      return perLayer(rows, "drift", "component", width, (row) => `layer ${row.layer}, ${row.names}\nnorm drift ${percent(row.drift, 4)}`, 2);
    };
  }

  const series = ["neutral-fill", "slanted-fill", "wrong-fill", "deflecting", "accent", "ink"];
  const symbols = ["circle", "diamond", "square", "triangle", "cross", "star"];
  const perLayer = (rows, key, group, width, title, digits, scale = { tickFormat: (value) => percent(value, digits) }) => {
    const kinds = group === "component" ? components(rows) : unique(rows.map((row) => row[group])).sort();
    const layers = unique(rows.map((row) => row.layer)).sort((one, other) => one - other);
    const plot = Plot.plot({
      width, height: 190, marginLeft: 52, marginBottom: 32, marginTop: 14,
      x: { label: "layer", ticks: layerTicks(layers, width), tickFormat: "d", labelAnchor: "right", inset: 8 },
      y: { label: null, grid: true, ticks: 4, zero: true, nice: true, ...scale },
      color: { domain: kinds, range: kinds.map((_, index) => colour(series[index % series.length])) },
      symbol: { domain: kinds, range: kinds.map((_, index) => symbols[index % symbols.length]) },
      marks: [
        Plot.dot(rows, { x: "layer", y: key, fill: group, symbol: group, r: 4, fillOpacity: 0.9 }),
        Plot.tip(rows, Plot.pointer({ x: "layer", y: key, title, ...tip() })),
      ],
    });
    return [plot, legend(kinds.map((kind, index) => [kind, colour(series[index % series.length]), symbols[index % symbols.length]]))];
  };

  const legend = (entries) => {
    const box = document.createElement("p");
    box.className = "key";
    for (const [name, fill, symbol] of entries) {
      const mark = document.createElement("span");
      mark.className = `mark ${symbol ?? ""}`;
      mark.style.background = fill;
      const entry = document.createElement("span");
      entry.append(mark, name);
      box.append(entry);
    }
    return box;
  };

  if (data.updates?.length) {
    const kinds = unique(data.updates.map((row) => row.name));
    const short = (name) => (kinds.length > 6 ? name.split(".")[0] : name);
    const rows = data.updates.map((row) => ({ ...row, kind: short(row.name) }));
    charts.updates = (width) => perLayer(rows, "change", "kind", width, (row) => `layer ${row.layer}, ${row.name}\nchanged by ${percent(row.change, 3)}`, 1);
  }

  if (data.changes) {
    const cells = data.changes.map((cell) => ({ ...cell, value: cell.relative }));
    charts.changes = (width) => map(cells, width, null, (cell) => `layer ${cell.layer}, ${cell.names}${tensors(cell)}\nrelative size ${percent(cell.relative, 3)}\n${cell.kind}${cell.rank ? `, rank ${cell.rank}` : ""}`);
  }

  if (data.spectra) {
    charts.spectra = (width) => {
      const points = data.spectra.flatMap((row) => row.shares.map((share, place) => ({ ...row, share: Math.max(1e-6, share), place: place + 1 })));
      const ticks = powers([...points.map((point) => point.share), 0.01, 1]);
      return Plot.plot({
        width, height: 190, marginLeft: 52, marginBottom: 32, marginTop: 14,
        x: { label: "singular value", labelAnchor: "right", ticks: unique(points.map((point) => point.place)), tickFormat: "d", inset: 8 },
        y: { label: null, grid: true, type: "log", domain: [ticks[0], 1], ticks, tickFormat: (value) => `${number(100 * value)} %` },
        marks: [
          Plot.lineY(points, { x: "place", y: "share", z: "name", stroke: colour("accent"), strokeOpacity: 0.35 }),
          Plot.dot(points, { x: "place", y: "share", r: 2, fill: colour("accent"), fillOpacity: 0.6 }),
          Plot.tip(points, Plot.pointer({ x: "place", y: "share", title: (point) => `${point.name}\nsingular value ${point.place}: ${percent(point.share, 2)} of the energy`, ...tip() })),
        ],
      });
    };
  }

  if (data.fits) {
    charts.fits = (width) => perLayer(data.fits, "cosine", "which", width, (row) => `${row.name}\n${row.which}${row.of == null ? "" : `, layer ${row.of}`}\ncosine ${row.cosine.toFixed(3)}`, 2, { tickFormat: String, domain: [0, 1] });
  }

  if (data.losses) {
    charts.losses = (width) => {
      const steps = data.losses.steps.map(([epoch, loss]) => ({ epoch, loss }));
      const kinds = unique(data.losses.held_out.map((row) => row.kind));
      const colours = kinds.map((_, index) => colour(["slanted-fill", "accent", "wrong-fill"][index % 3]));
      const all = [...steps.map((row) => ({ ...row, kind: "training" })), ...data.losses.held_out];
      const plot = Plot.plot({
        width, height: 190, marginLeft: 52, marginBottom: 32, marginTop: 14,
        x: { label: "epoch", labelAnchor: "right", ticks: 5, inset: 6 },
        y: { label: null, grid: true, ticks: 4, zero: true, nice: true },
        color: { domain: kinds, range: colours },
        marks: [
          Plot.lineY(steps, { x: "epoch", y: "loss", stroke: colour("deflecting-fill"), strokeWidth: 1.25 }),
          Plot.lineY(data.losses.held_out, { x: "epoch", y: "loss", stroke: "kind", strokeWidth: 1.75 }),
          Plot.dot(data.losses.held_out, { x: "epoch", y: "loss", fill: "kind", r: 3.5 }),
          Plot.tip(all, Plot.pointer({ x: "epoch", y: "loss", title: (row) => `${row.kind}${row.kind === "training" ? "" : ", held out"}\nepoch ${number(row.epoch)}, loss ${number(row.loss)}`, ...tip() })),
        ],
      });
      return [plot, legend([["training", colour("deflecting-fill")], ...kinds.map((kind, index) => [`${kind}, held out`, colours[index]])])];
    };
  }

  const striped = (id, ink, paper) => () => {
    const make = (name, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      Object.entries(attributes).forEach(([key, one]) => node.setAttribute(key, one));
      return node;
    };
    const pattern = make("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    pattern.append(make("rect", { width: 5, height: 5, fill: paper }), make("rect", { width: 3, height: 5, fill: ink }));
    const place = make("defs", {});
    place.append(pattern);
    return place;
  };

  if (data.verdicts) {
    charts.verdicts = (width) => {
      const kinds = ["slanted", "neutral", "deflecting", "wrong", "broken", "unclear"];
      const bars = data.verdicts.flatMap((row) => {
        let from = 0;
        return kinds.map((kind) => {
          const [hits, count] = row[kind];
          const start = from;
          from += hits / count;
          return { group: row.group, stage: row.stage, order: row.order, whose: kind === "slanted" ? row.whose : "", kind, hits, count, from: start, to: from, middle: (start + from) / 2 };
        });
      }).filter((bar) => bar.hits);
      const stages = unique([...data.verdicts].sort((one, other) => one.order - other.order).map((row) => row.stage));
      const groups = unique(data.verdicts.map((row) => row.group));
      const left = Math.min(130, 16 + 7 * Math.max(...stages.map((stage) => stage.length)));
      return Plot.plot({
        width, height: 34 + groups.length * (stages.length * 26 + 14), marginLeft: left, marginRight: Math.min(90, 14 + 7 * Math.max(...groups.map((group) => group.length))), marginBottom: 26, marginTop: 6,
        x: { label: null, domain: [0, 1], ticks: 5, tickFormat: (value) => percent(value, 0), grid: true },
        y: { label: null, domain: stages, tickSize: 0, padding: 0.22, tickFormat: (name) => (name.length > 16 ? `${name.slice(0, 15)}…` : name) },
        fy: { label: null, domain: groups, padding: 0.1 },
        color: { domain: kinds, range: kinds.map((kind) => colour(`${kind}-fill`)) },
        marks: [
          Plot.barX(bars.filter((bar) => bar.kind !== "broken"), { x1: "from", x2: "to", y: "stage", fy: "group", fill: "kind", insetLeft: 0.5, insetRight: 0.5 }),
          striped("broken-stripes", colour("broken-fill"), colour("paper")),
          Plot.barX(bars.filter((bar) => bar.kind === "broken"), { x1: "from", x2: "to", y: "stage", fy: "group", fill: "url(#broken-stripes)", stroke: colour("broken-fill"), insetLeft: 0.5, insetRight: 0.5 }),
          Plot.barX(bars.filter((bar) => bar.kind === "unclear"), { x1: "from", x2: "to", y: "stage", fy: "group", fill: "none", stroke: colour("soft"), strokeWidth: 0.75, insetLeft: 1, insetRight: 1 }),
          Plot.tip(bars, Plot.pointer({ x: "middle", y: "stage", fy: "group", maxRadius: Infinity, title: (bar) => `${bar.stage}, ${bar.group}\n${bar.kind}: ${bar.hits} of ${bar.count}, ${percent(bar.hits / bar.count)}${bar.whose ? `\n${bar.whose}` : ""}`, ...tip() })),
        ],
      });
    };
  }

  // What stands for a trial, the later over the earlier; each kind has a form of its own.
  const front = ({ up, across, budget, least, trials }, width) => {
    const placed = trials.filter((trial) => trial.complete);
    if (!placed.length) return null;
    const x = (value) => Math.max(value, least ?? -Infinity);
    const aim = (objective) => `${objective.name} (${objective.direction === "minimize" ? "less" : "more"} is better)`;
    const values = [...placed.map((trial) => trial.y), ...(up.base == null ? [] : [up.base])];
    const room = 0.08 * (Math.max(...values) - Math.min(...values)) || 0.1 * Math.abs(values[0]) || 1;
    const low = Math.min(...values) - room;
    const known = [...trials.map((trial) => trial.x).filter((value) => value != null), ...(budget == null ? [] : [budget])].map(x);
    const ticks = least == null ? [] : powers(known);
    const ends = least == null ? [Math.min(...known), Math.max(...known)] : [ticks[0], ticks.at(-1)];
    // What was not measured stands at the edge.
    const points = trials.map((trial) => ({ ...trial, x: x(trial.x ?? ends[1]), y: trial.complete ? trial.y : low }));
    const of = (kind) => points.filter((point) => point.complete && point[kind]);
    const best = of("front").sort((one, other) => one.x - other.x || one.y - other.y);
    const kinds = (point) => ["chosen", "plain", "front"].filter((kind) => point[kind]).concat(point.complete ? [] : ["incomplete"]);
    const at = { x: "x", y: "y" };
    const plot = Plot.plot({
      width, height: Math.min(380, Math.max(260, width * 0.6)), marginLeft: 52, marginBottom: 36, marginTop: 24, marginRight: 24, inset: 8,
      x: { label: across ? `${aim(across)} →` : "trial →", labelAnchor: "right", domain: ends, grid: true, ...(least == null ? { ticks: 5 } : { type: "log", ticks: ticks.filter((_, index) => index % Math.ceil((56 * ticks.length) / width) === 0), tickFormat: String }) },
      y: { label: `↑ ${aim(up)}`, domain: [low, Math.max(...values) + room], grid: true, ticks: 5 },
      marks: [
        ...(up.base == null ? [] : [
          Plot.ruleY([up.base], { stroke: colour("soft"), strokeDasharray: "1,3" }),
          Plot.text([up.base], { y: (value) => value, frameAnchor: "right", text: () => "unedited model", textAnchor: "end", dy: -7, fill: colour("soft") }),
        ]),
        ...(budget == null ? [] : [
          Plot.ruleX([x(budget)], { stroke: colour("soft"), strokeDasharray: "5,3" }),
          Plot.text([x(budget)], { x: (value) => value, frameAnchor: "top", text: () => "budget", textAnchor: "end", dx: -4, dy: -2, fill: colour("soft") }),
        ]),
        Plot.dot(points.filter((point) => !point.complete), { ...at, symbol: "times", r: 3.5, stroke: colour("soft"), strokeOpacity: 0.5 }),
        Plot.dot(points.filter((point) => point.complete && !point.front), { ...at, r: 3.5, fill: colour("deflecting"), fillOpacity: 0.55 }),
        Plot.lineY(best, { ...at, stroke: colour("accent"), strokeWidth: 1.5 }),
        Plot.dot(best, { ...at, symbol: "diamond", r: 5, fill: colour("accent"), stroke: colour("paper") }),
        Plot.dot(of("plain"), { ...at, symbol: "square", r: 6, fill: colour("paper"), stroke: colour("ink"), strokeWidth: 1.75 }),
        Plot.dot(of("chosen"), { ...at, symbol: "star", r: 9, fill: colour("slanted-fill"), stroke: colour("ink"), strokeWidth: 0.75 }),
        Plot.tip(points, Plot.pointer({ ...at, maxRadius: Infinity, title: (point) => [`trial ${[point.number, ...kinds(point)].join(", ")}`, point.values, ...point.setting].join("\n"), ...tip() })),
      ],
    });
    const key = [["trial", colour("deflecting"), "circle"], ["front", colour("accent"), "diamond"], ["plain edit", colour("ink"), "frame"], ["chosen", colour("slanted-fill"), "star"], ["incomplete", colour("soft"), "times"]];
    return [plot, legend(key.filter(([name]) => name !== "incomplete" || placed.length < trials.length))];
  };

  const bars = (rows, width) => {
    const left = Math.min(0.45 * width, 12 + 6.5 * Math.max(...rows.map((row) => row.parameter.length)));
    return Plot.plot({
      width, height: 12 + 20 * rows.length, marginLeft: left, marginRight: 48, marginTop: 6, marginBottom: 6,
      x: { axis: null, domain: [0, Math.max(...rows.map((row) => row.share)) || 1] },
      y: { label: null, domain: rows.map((row) => row.parameter), tickSize: 0, padding: 0.25 },
      marks: [
        Plot.barX(rows, { x: "share", y: "parameter", fill: colour("accent"), fillOpacity: 0.75 }),
        Plot.text(rows, { x: "share", y: "parameter", text: (row) => percent(row.share), textAnchor: "start", dx: 5, fill: colour("ink") }),
      ],
    });
  };

  const depth = (rows, width) => {
    if (!rows.length) return null;
    const parts = unique(rows.map((row) => row.part));
    const layers = unique(rows.map((row) => row.layer));
    const compared = rows.filter((row) => row.plain != null);
    const plot = Plot.plot({
      width, height: 220, marginLeft: 44, marginBottom: 32, marginTop: 14,
      x: { label: "layer", ticks: layerTicks(layers, width), tickFormat: "d", labelAnchor: "right", inset: 8 },
      y: { label: null, grid: true, ticks: 5, zero: true, nice: true },
      color: { domain: parts, range: parts.map((_, index) => colour(series[index % series.length])) },
      symbol: { domain: parts, range: parts.map((_, index) => symbols[index % symbols.length]) },
      marks: [
        Plot.lineY(compared, { x: "layer", y: "plain", stroke: "part", strokeOpacity: 0.6, strokeDasharray: "4,4" }),
        Plot.lineY(rows, { x: "layer", y: "chosen", stroke: "part", strokeWidth: 1.75 }),
        Plot.dot(rows, { x: "layer", y: "chosen", fill: "part", symbol: "part", r: layers.length > 40 ? 2 : 3.5 }),
        Plot.tip(rows, Plot.pointer({ x: "layer", y: "chosen", maxRadius: Infinity, title: (row) => `layer ${row.layer}, ${row.part}\nchosen ${number(row.chosen)}${row.plain == null ? "" : `, plain ${number(row.plain)}`}`, ...tip() })),
      ],
    });
    return [plot, legend(parts.map((part, index) => [part, colour(series[index % series.length]), symbols[index % symbols.length]]))];
  };

  (data.searches ?? []).forEach((search, index) => {
    charts[`front-${index}`] = (width) => front(search.front, width);
    charts[`depth-${index}`] = (width) => depth(search.depth, width);
  });
  (data.importance ?? []).forEach((each) => {
    charts[`importance-${each.search}-${each.place}`] = (width) => bars(each.bars, width);
  });

  function draw(id) {
    const place = at(id);
    if (!place || !charts[id]) return;
    const width = Math.floor(place.clientWidth);
    if (!width) return;
    const made = charts[id](width) ?? "Not measured.";
    const parts = Array.isArray(made) ? made : [made];
    if (parts[0] instanceof Element) {
      parts[0].setAttribute("role", "img");
      parts[0].setAttribute("aria-label", place.dataset.label);
    }
    place.replaceChildren(...parts);
  }
  const drawAll = () => Object.keys(charts).forEach(draw);

  let seen = 0;
  let waiting = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      if (document.documentElement.clientWidth !== seen) {
        seen = document.documentElement.clientWidth;
        drawAll();
      }
    });
  }).observe(document.documentElement);

  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const toggle = at("theme");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => {
    toggle.textContent = dark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`);
  };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); drawAll(); });
  system.addEventListener("change", () => { name(); drawAll(); });
  name();
  let chosen;
  let closed = [];
  addEventListener("beforeprint", () => {
    chosen = root.dataset.theme;
    root.dataset.theme = "light";
    root.classList.add("paper");
    closed = [...document.querySelectorAll("details:not([open]):not(.long)")];
    closed.forEach((each) => { each.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (chosen) root.dataset.theme = chosen; else delete root.dataset.theme;
    root.classList.remove("paper");
    closed.forEach((each) => { each.open = false; });
    drawAll();
  });

  for (const button of document.querySelectorAll(".copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.setAttribute("aria-label", `Copy the ${button.dataset.copy}`);
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(at(button.dataset.copy).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const form = at("filter");
  if (form) {
    const STEP = 20;
    const articles = [...at("list").children].map((node) => ({ node, text: node.textContent.toLocaleLowerCase() }));
    const more = at("more");
    let most = STEP;
    const value = (id) => at(id)?.value ?? "";
    const filter = () => {
      const wanted = { group: value("by-group"), language: value("by-language"), before: value("by-before"), after: value("by-after") };
      const text = value("by-text").trim().toLocaleLowerCase();
      const changed = at("by-change")?.checked;
      let count = 0;
      for (const { node, text: own } of articles) {
        const fits = Object.entries(wanted).every(([key, one]) => !one || node.dataset[key] === one)
          && (!changed || "changed" in node.dataset) && (!text || own.includes(text));
        count += fits;
        node.hidden = !fits || count > most;
      }
      at("count").textContent = `${count} of ${articles.length} questions${count > most ? `, the first ${most} shown` : ""}`;
      more.hidden = count <= most;
      more.textContent = `Show ${Math.min(100, count - most)} more`;
    };
    form.hidden = false;
    form.addEventListener("input", () => { most = STEP; filter(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => { most += 100; filter(); });
    filter();
  }
})();
