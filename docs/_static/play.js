// The page "Play": shows what tools/make_site_pictures.py drew. Nothing is computed here but which picture to show.
(() => {
  const root = "_static/play/";

  const films = document.getElementById("films");
  const video = films.querySelector("video"), said = document.getElementById("films-said");
  const people = ["left", "middle", "right"];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const table = [...document.querySelectorAll("table.films tbody tr")];

  function showFilm() {
    const [rule, person] = ["rule", "person"].map((name) => films.querySelector(`[name=${name}]:checked`).value);
    const name = `${rule}-${person}`;
    const row = table.find((tr) => tr.dataset.film === name);
    const numbers = [...row.querySelectorAll("td[data-face]")].map((td) => Number(td.textContent));
    video.src = `${root}${name}.mp4`;
    if (!still) video.play().catch(() => {});
    table.forEach((tr) => tr.classList.toggle("shown", tr === row));
    const changed = people.filter((_, k) => numbers[k] >= 1);
    const rest = people.filter((_, k) => numbers[k] < 1);
    said.textContent = `The ${people[person - 1]} person's driver is another one. ` +
      `Changed: ${changed.join(", ") || "nobody"}. As before: ${rest.join(", ") || "nobody"}.`;
  }
  if (still) video.removeAttribute("autoplay");
  films.addEventListener("change", showFilm);
  showFilm();

  const factors = document.getElementById("factors");
  const face = factors.querySelector(".face"), sliders = [...factors.querySelectorAll("input")];
  const stops = { yaw: [-30, -15, 0, 15, 30], mouth_open: [0, 0.5, 1], smile: [0, 0.5, 1], blink: [0, 0.5, 1], gaze_x: [-1, 0, 1] };
  const neutral = { yaw: 2, mouth_open: 0, smile: 0, blink: 0, gaze_x: 1 };

  function words(name, x) {
    if (name === "yaw") return x ? `${Math.abs(x)} degrees ${x < 0 ? "left" : "right"}` : "0 degrees";
    if (name === "gaze_x") return x ? (x < 0 ? "left" : "right") : "straight";
    return String(x);
  }
  function showFace() {
    const at = Object.fromEntries(sliders.map((s) => [s.name, Number(s.value)]));
    const row = 3 * at.mouth_open + at.smile, column = 3 * at.blink + at.gaze_x;
    face.style.backgroundImage = `url(${root}yaw${stops.yaw[at.yaw]}.webp)`;
    face.style.backgroundPosition = `${12.5 * column}% ${12.5 * row}%`;
    const told = sliders.map((s) => {
      const text = words(s.name, stops[s.name][at[s.name]]);
      s.nextElementSibling.textContent = text;
      s.setAttribute("aria-valuetext", text);
      return `${s.name.replace("_x", "").replace("_", " ")} ${text}`;
    });
    face.setAttribute("aria-label", `A drawn face: ${told.join(", ")}`);
  }
  factors.addEventListener("input", showFace);
  factors.addEventListener("click", (event) => {
    const what = event.target.dataset.do;
    if (!what) return;
    sliders.forEach((s) => { s.value = what === "random" ? Math.floor(Math.random() * (Number(s.max) + 1)) : neutral[s.name]; });
    showFace();
  });
  stops.yaw.forEach((yaw) => { new Image().src = `${root}yaw${yaw}.webp`; });
  showFace();
})();
