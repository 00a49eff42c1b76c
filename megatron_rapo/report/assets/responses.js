// The response browser: one problem a page, with its responses that pass the filters.
"use strict";
(() => {
  const root = document.getElementById("browser");
  if (!root) return;
  const data = JSON.parse(document.getElementById("responses-data").textContent);
  const search = root.querySelector("input[type=search]");
  const [model, outcome, dataset] = ["model", "outcome", "dataset"].map((name) => root.querySelector(`[name=${name}]`));
  const status = root.querySelector("[role=status]");
  const content = root.querySelector(".content");
  const [previous, next] = root.querySelectorAll(".pager button");
  const DEEPEST = 5; // nats; a token of this log-prob or less has the full colour
  let shown = [];
  let page = 0;

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  const wanted = (response) =>
    (model.value === "" || data.models[response.model] === model.value) &&
    (outcome.value === "" || response.outcome === outcome.value);

  function filter() {
    const words = search.value.trim().toLowerCase();
    shown = data.problems.flatMap((problem) => {
      if (dataset && dataset.value !== "" && problem.dataset !== dataset.value) return [];
      const exact = words.startsWith("#") ? `#${problem.id}`.toLowerCase() === words : null;
      const matches = exact ?? `${problem.id} ${problem.question} ${problem.answer}`.toLowerCase().includes(words);
      const responses = matches ? problem.responses.filter(wanted) : [];
      return responses.length ? [{ problem, responses }] : [];
    });
    page = 0;
    show();
  }

  function tokens(response) {
    const text = element("pre", "tokens");
    const starts = response.starts ?? [];
    let given = null; // the stretch of given tokens that the last one belongs to
    response.tokens.forEach((token, index) => {
      if (index === response.cut_at) {
        given = null;
        text.append(element("span", "gap", `\n… ${response.cut.toLocaleString("en")} tokens left out …\n`));
      }
      const sequence = starts.lastIndexOf(index) + 1;
      if (sequence) {
        given = null;
        text.append(element("span", "sequence", `sequence ${sequence} of ${starts.length}`));
      }
      const nats = response.log_probs[index];
      if (nats === null) {
        if (!given) {
          given = element("span", "given");
          given.title = "given, not sampled";
          text.append(given);
        }
        given.append(token);
        return;
      }
      given = null;
      const span = element("span", "", token);
      if (nats !== undefined) {
        span.style.setProperty("--h", ((Math.min(DEEPEST, -nats) / DEEPEST) * 75).toFixed(1));
        span.title = `log-prob ${nats.toFixed(2)} nats, probability ${Math.exp(nats).toPrecision(2)}`;
      }
      text.append(span);
    });
    text.tabIndex = 0;
    return text;
  }

  function card(response) {
    const facts = [
      `sample ${response.sample}`,
      `reward ${response.reward ?? "unknown"}`,
      `${response.length.toLocaleString("en")} tokens`,
      ...(response.given ? [`${response.given.toLocaleString("en")} given`] : []),
      ...(response.turns > 1 ? [`${response.turns} turns`] : []),
      ...(response.starts ? [`${response.starts.length} sequences`] : []),
      ...(response.truncated ? ["truncated"] : []),
    ];
    const heading = element(
      "header",
      "",
      element("strong", "", data.models[response.model]),
      element("span", `badge ${response.outcome}`, response.outcome),
      ...facts.map((fact) => element("span", "", fact)),
    );
    return element("article", "response", heading, tokens(response));
  }

  function show() {
    content.replaceChildren();
    previous.disabled = page === 0;
    next.disabled = page >= shown.length - 1;
    if (!shown.length) {
      status.textContent = "No response passes these filters.";
      return;
    }
    const { problem, responses } = shown[page];
    const names = element("h3", "", `Problem ${problem.id}`);
    if (dataset) names.append(element("span", "interval", ` · ${problem.dataset}`));
    const gold = element("p", "note", "Gold answer: ", element("code", "", problem.answer));
    content.append(names, element("div", "prompt", element("p", "", problem.question), gold), ...responses.map(card));
    status.textContent =
      `Problem ${page + 1} of ${shown.length} with responses that pass the filters · ` +
      `${responses.length} of its ${problem.sampled.toLocaleString("en")} responses`;
  }

  [model, outcome, dataset].forEach((select) => select?.addEventListener("change", filter));
  search.addEventListener("input", filter);
  previous.addEventListener("click", () => { page -= 1; show(); });
  next.addEventListener("click", () => { page += 1; show(); });
  // From the ledger: the responses to one problem.
  document.addEventListener("click", (event) => {
    const from = event.target.closest?.("[data-problem]");
    if (!from) return;
    search.value = `#${from.dataset.problem}`;
    if (dataset) dataset.value = from.dataset.dataset;
    model.value = outcome.value = "";
    filter();
    document.getElementById("responses").scrollIntoView();
    search.focus({ preventScroll: true });
  });
  filter();
})();
