// Each choice leaves the rows that have this value of its parameter.
const choices = [...document.querySelectorAll(".filters select")], filtered = [...document.querySelectorAll("tr[data-parameters]")];
const own = new Map(filtered.map(row => [row, JSON.parse(row.dataset.parameters)]));
const filter = () => {
  for (const row of filtered) row.hidden = choices.some(choice => choice.value && own.get(row)[choice.name] !== choice.value);
  document.querySelector(".shown").textContent = `${filtered.filter(row => !row.hidden).length} of ${filtered.length} shown`;
};
for (const choice of choices) choice.addEventListener("change", filter);
const filters = document.querySelector(".filters");
if (filters) filters.hidden = false; // without scripts it would do nothing
