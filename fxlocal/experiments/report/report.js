"use strict";
// What moves in the page. Python wrote what it says: `told` holds Bokeh's charts, and for the
// picture of the blocks each strategy's boundary by epoch and the borders of its local modules.
(() => {
  const told = JSON.parse(document.getElementById("told").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // --- tables ---

  function sortBy(heading) {
    const table = heading.closest("table");
    const index = [...heading.parentElement.children].indexOf(heading);
    const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const rows = all("tbody tr", table).map((row) => {
      const text = row.children[index].textContent.trim();
      return { row, text, number: index ? parseFloat(text.replace("~", "")) : NaN };
    });
    const words = rows.every(({ number }) => isNaN(number));
    rows.sort((a, b) => {
      if (words) return direction * a.text.localeCompare(b.text);
      if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) - isNaN(b.number);
      return direction * (a.number - b.number);
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
    all("th[aria-sort]", table).forEach((th) => th.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  }
  all("th[aria-sort] button").forEach((button) => {
    button.addEventListener("click", () => sortBy(button.parentElement));
  });

  // --- charts ---

  const charts = Bokeh.require("document").Document.from_json(told.charts);
  const plots = charts.roots();
  const places = all(".chart");
  const sources = plots.flatMap((plot) => plot.renderers.map((renderer) => renderer.data_source));
  const colors = new Map(sources.map((source) => [source, source.data.color ?? []]));

  function paint() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const [ink, rule] = [color("ink"), color("rule")];
    for (const plot of plots) {
      for (const axis of [...plot.below, ...plot.left]) {
        axis.setv({
          axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: ink,
          major_tick_line_color: ink, minor_tick_line_color: null,
        });
      }
      plot.center.filter((one) => "grid_line_color" in one).forEach((grid) => {
        grid.grid_line_color = rule;
      });
    }
    for (const [source, names] of colors) {
      source.data = { ...source.data, color: names.map(color) };
    }
  }

  const isFixed = (plot) => plot.x_range.tags.includes("fixed");  // not over epochs

  function follow(over) {
    const label = over === "epoch" ? "epoch" : "training time (s)";
    plots.filter((plot) => !isFixed(plot)).forEach((plot) => {
      for (const { glyph } of plot.renderers) {
        const field = "xs" in glyph ? "xs" : "x";
        glyph[field] = { field: over };
      }
      plot.below[0].axis_label = label;
      plot.x_range.have_updated_interactively = false;
    });
  }
  all("input[name=over]").forEach((choice) => {
    choice.addEventListener("change", () => follow(choice.value));
  });

  // The pointer is told of the epoch that is nearest: half of the way to the next one on each side.
  plots.filter((plot) => !isFixed(plot)).forEach((plot) => {
    const { glyph } = plot.renderers.at(-1);
    const widen = () => {
      glyph.size = { value: Math.max(4, plot.inner_width / byId("epoch").max) };
    };
    plot.properties.inner_width.change.connect(widen);
  });

  // --- which strategies are shown ---

  const boxes = all(".summary input[type=checkbox]");

  function show() {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const plot of plots) {
      for (const renderer of plot.renderers) {
        const names = renderer.data_source.data.strategy ?? [];
        renderer.view.filter.booleans = names.map((name) => shown.has(name));
      }
    }
    all("tr[data-strategy]").forEach((row) => {
      const off = !shown.has(row.dataset.strategy);
      row.classList.toggle("off", off);
      row.hidden = off && !row.closest(".summary");
    });
  }
  boxes.forEach((box) => box.addEventListener("change", show));
  for (const id of ["all", "none"]) {
    byId(id).addEventListener("click", () => {
      boxes.forEach((box) => { box.checked = id === "all"; });
      show();
    });
  }

  // --- one epoch ---

  const slider = byId("epoch");
  const chosen = byId("strategy");
  const svg = document.querySelector(".picture svg");
  const blocks = svg ? all('[id^="block-"][data-layers]', svg).map((block) => {
    const row = block.closest('[id^="row-"]');
    return {
      block,
      layers: JSON.parse(block.dataset.layers),  // [index, path, cost] of each
      box: block.querySelector("path").getBBox(),
      area: row.querySelector('[id^="area-"] path').getBBox(),
    };
  }) : [];

  const values = new Map();  // of each chart, strategy and epoch
  plots.forEach((plot, i) => {
    const { strategy = [], epoch = [], y, low, high, label } = plot.renderers.at(-1).data_source.data;
    strategy.forEach((name, k) => {
      if (label[k] !== name) return;  // a run that ended early is not the mean
      values.set(`${told.titles[i]} ${epoch[k]} ${name}`, [y[k], low[k], high[k]]);
    });
  });

  function add(parent, tag, name, place) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    made.setAttribute("class", `moved ${name}`);
    Object.entries(place).forEach(([key, value]) => made.setAttribute(key, value));
    parent.append(made);
  }

  function cut({ block, area }, x, name) {
    const place = { x1: x, x2: x, y1: area.y, y2: area.y + area.height };
    add(block, "line", name, place);
  }

  function draw(boundary, borders, prefix) {
    all(".moved", svg).forEach((old) => old.remove());
    const kind = prefix.startsWith("frozen") ? "prefix frozen" : "prefix";
    for (const one of blocks) {
      const { block, layers, box } = one;
      const cost = (some) => some.reduce((sum, layer) => sum + layer[2], 0);
      const share = cost(layers.filter(([index]) => index < boundary)) / cost(layers);
      const { x, y, width, height } = box;
      if (share) add(block, "rect", kind, { x, y, height, width: share * width });
      const before = x - 0.158 * width;  // half of the gap between blocks
      if (borders.includes(layers[0][0])) cut(one, before, "border");
      if (boundary && layers.some(([index]) => index === boundary)) {
        cut(one, share ? x + share * width : before, "cut");
      }
    }
  }

  function describe(name, epoch) {
    const { boundary, borders, prefix, seed } = told.moving[name];
    const at = boundary[Math.min(epoch, boundary.length) - 1] ?? 0;
    const layers = blocks.flatMap((one) => one.layers);
    const path = (index) => layers.find((layer) => layer[0] === index)?.[1] ?? index;
    draw(at, borders, prefix);
    const text = at
      ? `${at} of ${layers.length} layers before the boundary, ${prefix}`
      : `all ${layers.length} layers learn by back-propagation`;
    svg.querySelector("#head text").textContent = text;  // it was drawn with the boundary at 0
    const stop = at ? `; back-propagation stops at ${path(at)}` : "";
    const modules = borders.length
      ? `; ${borders.length + 1} stages, which end before ${borders.map(path).join(", ")}` : "";
    return `${name}, seed ${seed}: ${text}${stop}${modules}.`;
  }

  function visit() {
    const epoch = Number(slider.value);
    const text = chosen ? describe(chosen.value, epoch) : "";
    byId("now").textContent = `Epoch ${epoch} of ${slider.max}. ${text}`;
    slider.setAttribute("aria-valuetext", `epoch ${epoch} of ${slider.max}`);
    all(".epoch td[data-chart]").forEach((cell) => {
      const name = cell.closest("tr").dataset.strategy;
      const [y, low, high] = values.get(`${cell.dataset.chart} ${epoch} ${name}`) ?? [];
      const text = (value) => value.toPrecision(4).replace(/\.?0+$/, "");
      cell.textContent = y === undefined ? "-"
        : text(y) + (low < high ? ` (${text(low)} to ${text(high)})` : "");
    });
  }
  slider.addEventListener("input", visit);
  chosen?.addEventListener("change", visit);

  // --- the command ---

  byId("copy")?.addEventListener("click", async () => {
    const command = byId("command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      byId("copied").textContent = "copied";
    } catch {  // a browser that lets no page write: the text is marked, to be copied by key
      getSelection().selectAllChildren(command);
      byId("copied").textContent = "selected; copy it with Ctrl-C";
    }
  });

  paint();
  show();
  visit();
  dark.addEventListener("change", paint);
  Bokeh.embed.add_document_standalone(charts, document.querySelector(".charts"), places)
    .then(() => { document.documentElement.dataset.ready = Math.round(performance.now()); });
})();
