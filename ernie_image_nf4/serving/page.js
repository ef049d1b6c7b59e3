(() => {
  const SIZES = /* SIZES */ {};
  const LARGEST_FILE = /* LARGEST_FILE */ Infinity;
  const LANGUAGES = ["en", "zh"];

  // What is remembered in this browser; without storage (private windows) nothing is
  const recall = (key) => {
    try { return localStorage.getItem(`ernie-image-${key}`); } catch { return null; }
  };
  const remember = (key, value) => {
    try { localStorage.setItem(`ernie-image-${key}`, value); } catch { /* next time the browser's own again */ }
    return value;
  };
  const speak = (language) => {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    return language;
  };

  // What Gradio leaves to be said: which files its button is for, and what its group of shapes is called
  const describe = () => {
    document.querySelector("input[type=file]")?.setAttribute("accept", ".png,.jpg,.jpeg,.webp");
    const shapes = document.querySelector("#shape");
    const name = shapes?.querySelector("[data-testid=block-info]");
    if (name) {
      name.id = "shape-name";
      shapes.setAttribute("aria-labelledby", name.id);
    }
  };

  const spoken = () => {
    const chosen = recall("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
    return LANGUAGES.includes(chosen) ? chosen : "en";
  };

  let refused = "";

  window.ernie = {
    size: (shape, width, height) => SIZES[shape] ?? [width, height],
    shape: (width, height) =>
      Object.keys(SIZES).find((name) => SIZES[name][0] === width && SIZES[name][1] === height) ?? null,
    roll: () => String(crypto.getRandomValues(new Uint32Array(1))[0]),
    language: (_, ...others) => {
      look();
      describe();
      return [speak(spoken()), ...others];
    },
    // The field that holds the language is set by the server, a moment after the page shows it
    spoken: (_, ...others) => [spoken(), ...others],
    refused: () => [refused, spoken()],
    otherLanguage: (language, ...others) => {
      return [speak(remember("language", language === "zh" ? "en" : "zh")), ...others];
    },
  };

  // A picture is named by its prompt, for those who can't see it
  new MutationObserver(() => {
    const image = document.querySelector("#picture img");
    const prompt = document.querySelector("#revised textarea")?.value;
    if (image && prompt && image.alt !== prompt) image.alt = prompt;
  }).observe(document.documentElement, { childList: true, subtree: true });

  // Light and dark: the system's, unless it was chosen here
  const looks = recall("looks");
  const look = () => looks && document.body?.classList.toggle("dark", looks === "dark");
  look();
  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) {
      remember("looks", document.body.classList.toggle("dark") ? "dark" : "light");
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.querySelector("#draw")?.click();
    }
  });

  // A file that the server wouldn't read isn't sent; it only says so. Gradio would, in English
  document.addEventListener("change", (event) => {
    const file = event.target.matches("input[type=file]") ? event.target.files[0] : null;
    if (!file || file.size <= LARGEST_FILE) return;
    event.stopImmediatePropagation();
    event.target.value = "";
    refused = file.name;
    document.querySelector("#too-large")?.click();
  }, true);

  // A file dropped anywhere goes the way of the button that reads settings
  const bringsFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (held) => document.querySelector("#drop")?.classList.toggle("shown", held);
  document.addEventListener("dragover", (event) => {
    if (!bringsFiles(event)) return;
    event.preventDefault();
    show(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) show(false);
  });
  document.addEventListener("drop", (event) => {
    show(false);
    if (!bringsFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    const [file] = event.dataTransfer.files;
    const input = document.querySelector("input[type=file]");
    if (!file || !input) return;
    const one = new DataTransfer();
    one.items.add(file);
    input.files = one.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, true);
})();
