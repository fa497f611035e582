"use strict";
// Answers of all models to one question, side by side.
{
  const box = document.getElementById("answers"), chosen = document.getElementById("answers-question");
  const [back, on] = document.querySelectorAll("#answers-turn button");
  const questions = data.answers.flatMap(({ job, questions: own }) => own.map((question) => ({ job, ...question })));
  const paint = () => {
    const number = Number(chosen.value), question = questions[number];
    const scored = question.answers.some((answer) => answer.score !== null);
    const told = (score) => (score === null ? (scored ? "no score" : "") : `score ${decimals(score)}`);
    const cards = question.answers.map((answer) => html("article", {},
      html("h3", {}, answer.model, html("small", {}, told(answer.score))),
      ...answer.turns.map((turn) => html("div", { class: "text" }, turn))));
    box.replaceChildren(
      html("p", { class: "muted" }, `${question.scorer}, question ${question.name}${question.category && `, ${question.category}`}, seed ${question.seed}; from ${question.job}`),
      ...question.turns.map((turn) => html("div", { class: "text asked" }, turn)),
      html("div", { class: "cards", tabindex: 0, role: "group", "aria-label": "answers" }, ...cards));
    back.disabled = number === 0;
    on.disabled = number === questions.length - 1;
  };
  const turn = (by) => { chosen.value = String(Number(chosen.value) + by); paint(); };
  chosen.append(...choices(questions.map((question) => `${question.scorer} ${question.name}: ${short((question.turns[0] || "").replace(/\s+/g, " "), 60)}`)));
  chosen.onchange = paint;
  back.onclick = () => turn(-1);
  on.onclick = () => turn(1);
  paint();
}
