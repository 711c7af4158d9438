"use strict";
// The map of experts: a canvas a projection, one focusable cell that moves over them, and details as text.
(() => {
  const raw = document.getElementById("data").textContent;
  if (!raw) return;
  const data = JSON.parse(raw);
  const byId = (id) => document.getElementById(id);
  const codeOf = new Map([...data.codes].map((code, index) => [code, index]));
  const names = data.order;
  const nLayers = data.layers.length, nExperts = data.n_expert;
  const types = {};
  for (const name of names) types[name] = data.projections[name].types.map((row) => [...row].map((c) => codeOf.get(c)));
  const totals = data.tokens && data.tokens.map((row) => row.reduce((sum, n) => sum + n, 0));
  const board = byId("board"), panels = byId("panels"), grid = byId("grid");
  const state = { rows: [], columns: [], row: 0, column: 0, only: null, panels: [], cell: [8, 8], ring: null };
  const value = (id) => byId(id).value;

  // What a cell is coloured and sorted by: null where nothing was measured
  function measure(kind, name, layer, expert) {
    const own = data.projections[name];
    if (kind === "type") {
      const code = types[name][layer][expert];
      return code === undefined ? null : data.types[code].bpw;
    }
    if (kind === "tokens") {
      const count = data.tokens[layer][expert];
      return count === undefined || !totals[layer] ? null : count / totals[layer];
    }
    const row = own[kind][layer];
    return row && row[expert] !== undefined ? row[expert] : null;
  }

  function shown() { return value("projection") ? [value("projection")] : names; }

  function total(kind, layer, expert) {
    if (kind === "tokens") return measure(kind, names[0], layer, expert) ?? -1;
    let sum = 0;
    for (const name of shown()) sum += measure(kind, name, layer, expert) ?? 0;
    return sum;
  }

  // Rows and columns in the order that is wanted: the largest first, equal ones by number
  function sort() {
    const numbers = [...Array(nExperts).keys()], by = value("experts");
    state.columns = data.layers.map((_, layer) => {
      if (by === "order") return numbers;
      const keys = numbers.map((expert) => total(by, layer, expert));
      return [...numbers].sort((a, b) => keys[b] - keys[a] || a - b);
    });
    const rows = [...Array(nLayers).keys()], rowsBy = value("layers");
    if (rowsBy === "order") { state.rows = rows; return; }
    const sums = rows.map((layer) => numbers.reduce((sum, expert) => sum + total(rowsBy, layer, expert), 0));
    state.rows = rows.sort((a, b) => sums[b] - sums[a] || a - b);
  }

  function style(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

  function cellSize() {
    const kind = value("cells");
    if (kind === "large") return [30, 24];
    if (kind === "medium") return [12, 14];
    const side = shown().length > 1 && nExperts <= 64 && board.clientWidth > 700 ? shown().length : 1;
    const room = (board.clientWidth - 24) / side - 48;
    const width = Math.max(3, Math.min(26, Math.floor(room / nExperts)));
    return [width, Math.max(5, Math.min(22, Math.round(Math.max(width, 300 / nLayers))))];
  }

  // The range of a ramp; damages span decades, so their colours go by the logarithm
  function range(kind) {
    let low = Infinity, high = -Infinity;
    for (const name of shown()) for (let layer = 0; layer < nLayers; layer++) for (let e = 0; e < nExperts; e++) {
      const found = measure(kind, name, layer, e);
      if (found !== null && found > 0) { low = Math.min(low, found); high = Math.max(high, found); }
    }
    return low <= high ? [low, high] : [0, 0];
  }

  function shade(found, [low, high]) {
    if (!(found > 0)) return data.shades[0];
    const part = high > low ? Math.log(found / low) / Math.log(high / low) : 1;
    return data.shades[Math.max(0, Math.min(data.shades.length - 1, Math.round(part * (data.shades.length - 1))))];
  }

  const known = new Map();
  function channels(colour) {
    if (!known.has(colour)) known.set(colour, [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
    return known.get(colour);
  }

  function isLight(colour) {
    const [r, g, b] = channels(colour);
    return 0.299 * r + 0.587 * g + 0.114 * b > 140;
  }

  function draw() {
    const kind = value("colour"), [width, height] = (state.cell = cellSize());
    const limits = kind === "type" ? null : range(kind), gap = width >= 8 ? 1 : 0, gapY = height >= 6 ? 1 : 0;
    const stacked = nExperts > 64 || board.clientWidth <= 700 && value("cells") === "fit";
    panels.classList.toggle("stacked", stacked);
    panels.replaceChildren();
    state.panels = [];
    const scale = Math.max(1, window.devicePixelRatio || 1), left = 40, bottom = 18;
    const ink = style("--ink"), muted = style("--muted"), dim = Number(style("--dim"));
    const every = Math.max(1, Math.ceil(13 / height)), columns = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => n * width >= 26) || 256;
    for (const name of shown()) {
      const panel = document.createElement("div"), title = document.createElement("h3"), canvas = document.createElement("canvas");
      panel.className = "panel";
      title.textContent = name;
      canvas.setAttribute("aria-hidden", "true");
      const w = left + nExperts * width, h = nLayers * height + bottom;
      canvas.width = Math.ceil(w * scale); canvas.height = Math.ceil(h * scale);
      canvas.style.width = `${w}px`; canvas.style.height = `${h}px`;
      const pen = canvas.getContext("2d");
      pen.scale(scale, scale);
      pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle";
      // a pixel a cell, enlarged: far quicker than a rectangle each
      const cells = new ImageData(nExperts, nLayers), labels = [];
      for (let row = 0; row < nLayers; row++) {
        const layer = state.rows[row];
        if (row % every === 0) {
          pen.fillStyle = ink; pen.textAlign = "right";
          pen.fillText(String(data.layers[layer]), left - 6, Math.max(6, (row + 0.5) * height));
        }
        for (let column = 0; column < nExperts; column++) {
          const expert = state.columns[layer][column], code = types[name][layer][expert];
          if (code === undefined) continue;
          const colour = kind === "type" ? data.types[code].colour : shade(measure(kind, name, layer, expert), limits);
          const dimmed = state.only !== null && code !== state.only;
          cells.data.set([...channels(colour), dimmed ? 255 * dim : 255], 4 * (row * nExperts + column));
          if (width >= 24 && height >= 16 && !dimmed) labels.push([row, column, code, isLight(colour)]);
        }
      }
      const small = document.createElement("canvas");
      small.width = nExperts; small.height = nLayers;
      small.getContext("2d").putImageData(cells, 0, 0);
      pen.imageSmoothingEnabled = false;
      pen.drawImage(small, left, 0, nExperts * width, nLayers * height);
      if (gap) for (let column = 1; column <= nExperts; column++) pen.clearRect(left + column * width - gap, 0, gap, nLayers * height);
      if (gapY) for (let row = 1; row <= nLayers; row++) pen.clearRect(left, row * height - gapY, nExperts * width, gapY);
      pen.textAlign = "center";
      for (const [row, column, code, light] of labels) {
        pen.fillStyle = light ? "#000000" : "#ffffff";
        pen.fillText(data.types[code].bpw.toPrecision(2), left + (column + 0.5) * width, (row + 0.5) * height);
      }
      pen.fillStyle = muted; pen.textAlign = "center";
      const sorted = value("experts") !== "order";
      for (let column = 0; column < nExperts; column += columns) {
        pen.fillText(sorted ? `#${column + 1}` : String(column), left + (column + 0.5) * width, h - bottom / 2);
      }
      panel.append(title, canvas);
      panels.append(panel);
      state.panels.push({ name, canvas, left });
    }
    byId("ramp").hidden = kind === "type";
    if (limits) {
      const unit = kind === "tokens" ? "of a layer's routed tokens" : data.unit;
      byId("ramp-low").textContent = text(limits[0], kind);
      byId("ramp-high").textContent = `${text(limits[1], kind)} ${unit}`;
      byId("ramp-bar").style.background = `linear-gradient(to right, ${data.shades.join(",")})`;
    }
    place();
  }

  function text(found, kind) {
    if (found === null || found === undefined) return "not measured";
    if (kind === "tokens") return `${(100 * found).toPrecision(3)} %`;
    return found === 0 ? "0" : found < 1e-3 ? found.toExponential(2) : found.toPrecision(3);
  }

  function facts(layer, expert) {
    return names.map((name) => {
      const code = types[name][layer][expert];
      if (code === undefined) return null;
      const type = data.types[code], reference = data.projections[name].reference[layer];
      return {
        name, type: type.name, bpw: type.bpw,
        damage: measure("damage", name, layer, expert),
        sensitivity: measure("sensitivity", name, layer, expert), reference,
      };
    }).filter((fact) => fact !== null);
  }

  function share(layer, expert) {
    if (!data.tokens || data.tokens[layer][expert] === undefined) return "";
    const count = data.tokens[layer][expert], part = measure("tokens", names[0], layer, expert);
    return count === 0 ? "never routed to" : `${count.toLocaleString("en")} tokens, ${text(part, "tokens")} of the layer's`;
  }

  function sentence(layer, expert) {
    const each = facts(layer, expert).map((fact) => {
      let said = `${fact.name} ${fact.type}, ${fact.bpw.toPrecision(3)} bits per weight`;
      if (fact.damage !== null) said += `, predicted damage ${text(fact.damage)}`;
      if (fact.sensitivity !== null) said += `, in ${fact.reference} ${text(fact.sensitivity)}`;
      return said;
    });
    const routed = share(layer, expert);
    return `Layer ${data.layers[layer]}, expert ${expert}${routed ? `: ${routed}` : ""}. ${each.join(". ")}.`;
  }

  function element(name, content, attributes = {}) {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    for (const [key, found] of Object.entries(attributes)) made.setAttribute(key, found);
    return made;
  }

  function line(cells, head) {
    const row = element("tr");
    cells.forEach((content, index) => {
      const kind = head || index === 0 ? "th" : "td";
      row.append(element(kind, content, kind === "th" ? { scope: head ? "col" : "row" } : {}));
    });
    return row;
  }

  function described(layer, expert) {
    const found = facts(layer, expert), table = element("table"), measured = data.score !== null;
    const reference = found.length ? found[0].reference : null;
    const head = ["projection", "type", "bpw", ...(measured ? ["predicted damage", `sensitivity (in ${reference ?? "one type"})`] : [])];
    table.append(line(head, true));
    for (const fact of found) {
      const more = measured ? [text(fact.damage), text(fact.sensitivity)] : [];
      table.append(line([fact.name, fact.type, fact.bpw.toPrecision(3), ...more], false));
    }
    const title = element("p");
    title.append(element("strong", `Layer ${data.layers[layer]}, expert ${expert}`));
    const routed = share(layer, expert);
    if (routed) title.append(` · ${routed}`);
    return [title, table];
  }

  function at(row, column) { return [state.rows[row], state.columns[state.rows[row]][column]]; }

  // A new cell each time: a screen reader then says its label
  function place(focus = false) {
    const [layer, expert] = at(state.row, state.column), had = focus || grid.contains(document.activeElement);
    const row = element("div", undefined, { role: "row", "aria-rowindex": String(state.row + 1) });
    const cell = element("div", undefined, {
      role: "gridcell", tabindex: "0", class: "ring", "aria-colindex": String(state.column + 1), "aria-label": sentence(layer, expert),
    });
    row.append(cell);
    const rings = state.panels.slice(1).map(() => element("div", undefined, { class: "ring" }));
    grid.replaceChildren(row);
    byId("rings").replaceChildren(...rings);
    [cell, ...rings].forEach((ring, index) => {
      const { canvas, left } = state.panels[index], [width, height] = state.cell;
      const box = canvas.getBoundingClientRect(), outer = board.getBoundingClientRect();
      ring.style.left = `${box.left - outer.left - board.clientLeft + board.scrollLeft + left + state.column * width}px`;
      ring.style.top = `${box.top - outer.top - board.clientTop + board.scrollTop + state.row * height}px`;
      ring.style.width = `${Math.max(2, width - 1)}px`;
      ring.style.height = `${Math.max(2, height - 1)}px`;
    });
    state.ring = cell;
    if (had) { cell.focus({ preventScroll: true }); cell.scrollIntoView({ block: "nearest", inline: "nearest" }); }
    const detail = byId("detail");
    detail.replaceChildren(...described(layer, expert));
  }

  function cellAt(event) {
    const panel = state.panels.find((one) => one.canvas === event.target);
    if (!panel) return null;
    const box = panel.canvas.getBoundingClientRect(), [width, height] = state.cell;
    const column = Math.floor((event.clientX - box.left - panel.left) / width), row = Math.floor((event.clientY - box.top) / height);
    return column >= 0 && column < nExperts && row >= 0 && row < nLayers ? [row, column] : null;
  }

  const tip = element("div", undefined, { class: "tip", "aria-hidden": "true" });
  tip.hidden = true;
  document.body.append(tip);
  board.addEventListener("pointermove", (event) => {
    const found = event.pointerType === "mouse" ? cellAt(event) : null;
    tip.hidden = found === null;
    if (found === null) return;
    tip.replaceChildren(...described(...at(...found)));
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 16, window.innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + 20 + height > window.innerHeight ? event.clientY - height - 12 : event.clientY + 20}px`;
  });
  board.addEventListener("pointerleave", () => { tip.hidden = true; });
  board.addEventListener("click", (event) => {
    const found = cellAt(event);
    if (found) { [state.row, state.column] = found; place(true); }
  });
  board.addEventListener("keydown", (event) => {
    const page = 8, last = [nLayers - 1, nExperts - 1];
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-page, 0], PageDown: [page, 0],
      Home: [event.ctrlKey ? -last[0] : 0, -last[1]], End: [event.ctrlKey ? last[0] : 0, last[1]],
    };
    const move = moves[event.key];
    if (event.key === "Escape") tip.hidden = true;
    if (!move || event.altKey || event.metaKey) return;
    event.preventDefault();
    state.row = Math.max(0, Math.min(last[0], state.row + move[0]));
    state.column = Math.max(0, Math.min(last[1], state.column + move[1]));
    place(true);
  });

  byId("legend").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const code = data.types.findIndex((type) => type.name === button.dataset.type);
    state.only = state.only === code ? null : code;
    for (const other of byId("legend").querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(state.only !== null && other.dataset.type === data.types[state.only].name));
    }
    draw();
  });

  // The same cell stays the chosen one when the order changes
  function reorder() {
    const [layer, expert] = at(state.row, state.column);
    sort();
    state.row = state.rows.indexOf(layer);
    state.column = state.columns[layer].indexOf(expert);
    draw();
  }

  function layerTable() {
    const layer = data.layers.indexOf(Number(value("table-layer"))), measured = data.score !== null;
    const head = ["expert", ...(data.tokens ? ["tokens", "share"] : [])];
    for (const name of names) head.push(`${name} type`, `${name} bpw`, ...(measured ? [`${name} damage`, `${name} sensitivity`] : []));
    const body = element("tbody"), top = element("thead");
    top.append(line(head, true));
    for (let expert = 0; expert < nExperts; expert++) {
      const cells = [String(expert)];
      if (data.tokens) {
        const count = data.tokens[layer][expert];
        cells.push(count === undefined ? "" : String(count), count === undefined ? "" : text(measure("tokens", names[0], layer, expert), "tokens"));
      }
      const found = facts(layer, expert);
      for (const name of names) {
        const fact = found.find((one) => one.name === name);
        cells.push(fact ? fact.type : "", fact ? fact.bpw.toPrecision(3) : "");
        if (measured) cells.push(fact ? text(fact.damage) : "", fact ? text(fact.sensitivity) : "");
      }
      body.append(line(cells, false));
    }
    byId("layer-rows").replaceChildren(top, body);
  }

  for (const id of ["tools", "board", "detail"]) byId(id).hidden = false;
  grid.setAttribute("aria-rowcount", String(nLayers));
  grid.setAttribute("aria-colcount", String(nExperts));
  sort();
  draw();
  for (const id of ["experts", "layers", "projection"]) byId(id).addEventListener("change", reorder);
  for (const id of ["colour", "cells"]) byId(id).addEventListener("change", draw);
  byId("table-layer").addEventListener("change", layerTable);
  byId("layer-table").addEventListener("toggle", () => { if (byId("layer-table").open) layerTable(); });
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", draw);
  let width = board.clientWidth;
  window.addEventListener("resize", () => {
    if (board.clientWidth !== width) { width = board.clientWidth; draw(); }
  });
  const opened = [];
  window.addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not(#layer-table)")) if (!one.open) { one.open = true; opened.push(one); }
  });
  window.addEventListener("afterprint", () => { while (opened.length) opened.pop().open = false; });
  document.documentElement.dataset.ready = "yes";
})();
