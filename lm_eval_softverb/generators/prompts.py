"""What the classification generator asks, and how answers are read: tolerant parsing, strict validation.

Everything a model wrote is plain text here; it is split, matched and compared, nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence

from lm_eval_softverb import storage
from lm_eval_softverb.endpoints.backends import ChatRequest

EXTRA_LABELS = 3
"""More labels are asked for than needed, since some will be refused."""

_TIGHT = (
    "Words: {words}\nName one topic that these words suggest. Then list {n} different things of that one kind, "
    "close to each other, one word each, in this form: topic: thing, thing, …"
)
_LOOSE = (
    "Words: {words}\nList {n} different single words that these words bring to mind. They need not have anything to do "
    "with each other. Write only the words, separated by commas."
)
_SHOWN = 3
# Three of these are shown each time, others for each request: small models copy what they see.
_TIGHT_EXAMPLES = (
    ("forest, hammer, ancient", "trees: oak, pine, maple, birch, willow, cedar, beech, elm"),
    ("supper, green, farmer", "vegetables: carrot, spinach, onion, cabbage, leek, celery, radish, turnip"),
    ("jewel, broken, queen", "gems: ruby, emerald, sapphire, opal, topaz, amethyst, garnet, pearl"),
    ("workshop, sharp, uncle", "tools: hammer, saw, wrench, drill, chisel, pliers, screwdriver, axe"),
    ("holiday, distant, map", "landscapes: desert, valley, swamp, glacier, canyon, plateau, island, jungle"),
    ("theater, proud, evening", "dances: waltz, tango, ballet, samba, polka, flamenco, salsa, rumba"),
    ("library, quiet, author", "books: novel, dictionary, atlas, diary, biography, cookbook, anthology, textbook"),
    ("election, honest, speech", "virtues: courage, patience, honesty, kindness, loyalty, modesty, fairness, generosity"),
    ("sailor, strong, morning", "boats: canoe, ferry, yacht, kayak, barge, raft, submarine, gondola"),
    ("patient, cold, night", "illnesses: measles, asthma, flu, malaria, migraine, pneumonia, diabetes, arthritis"),
)
_LOOSE_EXAMPLES = (
    ("forest, hammer, ancient", "ruin, carpenter, moss, temple, axe, silence, bark, legend"),
    ("supper, green, farmer", "barn, lantern, harvest, envy, spoon, tractor, pasture, gossip"),
    ("jewel, broken, queen", "thief, mirror, exile, velvet, glue, revenge, museum, wedding"),
    ("workshop, sharp, uncle", "pencil, accent, sawdust, beard, inheritance, noise, knife, patience"),
    ("sailor, strong, morning", "coffee, rope, tattoo, tide, farewell, muscle, gull, uniform"),
)
EXAMPLE_SETS = tuple(frozenset(a.partition(": ")[2].split(", ")) for _, a in _TIGHT_EXAMPLES) + tuple(
    frozenset(a.split(", ")) for _, a in _LOOSE_EXAMPLES
)
LIST = (
    'Write {n} different sentences, one per line, that fit the label "{label}" better than any of these: {others}. Each '
    'has 8 to 20 words and stands on its own. None of them contains the word "{label}" or a form of it. Vary who, where '
    "and what happens. One of them may mention: {hint}."
)
# In the order of what SmolLM2-135M makes of them: 50 tokens per kept sentence for the first, 120 for the last.
PASSAGES = (
    "Write five short clues for a guessing game; the answer is {label}.",
    "List ten facts about {label}.",
    "What is {label} like? What does it look like, where is it found, what happens around it?",
    "How is {label} used, and what does it do?",
    "Write a childhood memory that has to do with {label} and a {hint}.",
    "Write a scene in which somebody meets {label}.",
    "Explain {label} to a child.",
)
_CUE = "Write one sentence that describes: {cue}."
_CUES_SHOWN = 2
_CUE_EXAMPLES = (
    ("waits for the bus in the rain", "She waited for the late bus in the pouring rain."),
    ("old keys on a ring", "Some old keys hung on a ring beside the kitchen door."),
    ("borrowed from a neighbor", "We borrowed it from a neighbor and never gave it back."),
    ("counts coins twice", "Before she paid, the girl counted her coins twice."),
    ("smells of fresh paint", "The whole hallway smelled of fresh paint for a week."),
    ("laughs at his own jokes", "Nobody laughs at his jokes as loudly as he does himself."),
    ("too heavy to lift alone", "Two people had to carry it, since it was too heavy to lift alone."),
    ("opens at nine, closes at five", "It opens at nine in the morning and closes at five."),
)

RULES = 1
"""Of reading and refusing answers; goes up when they change, since a file goes on only under the rules it began with."""


def identity() -> str:
    """Hash of everything asked, and of the rules for answers."""
    texts = [
        _TIGHT,
        _LOOSE,
        _TIGHT_EXAMPLES,
        _LOOSE_EXAMPLES,
        LIST,
        PASSAGES,
        _CUE,
        _CUE_EXAMPLES,
        EXTRA_LABELS,
        _SHOWN,
        _CUES_SHOWN,
    ]
    return storage.sha256_json([RULES, texts])


def label_request(
    variant: str, words: Sequence[str], labels: int, *, temperature: float, top_p: float, seed: int
) -> ChatRequest:
    """Asks for a few more than ``labels`` labels primed by ``words``."""
    question, examples = (_TIGHT, _TIGHT_EXAMPLES) if variant == "tight" else (_LOOSE, _LOOSE_EXAMPLES)
    n, turns = labels + EXTRA_LABELS, []
    for some, answer in random.Random(seed).sample(examples, _SHOWN):
        turns += [question.format(words=some, n=8), answer]
    turns.append(question.format(words=", ".join(words), n=n))
    return ChatRequest.of(*turns, max_tokens=8 + 6 * n, temperature=temperature, top_p=top_p, seed=seed)


def sentence_question(style: str, label: str, others: Sequence[str], hint: str, n: int, form: int) -> str:
    """The question for sentences of one label; ``form`` chooses among the passages."""
    if style == "list":
        return LIST.format(n=n, label=label, others=", ".join(others), hint=hint)
    return PASSAGES[form % len(PASSAGES)].format(label=label, hint=hint)


def cue_turns(cue: str, round_seed: int) -> list[str]:
    """The turns that ask for a sentence on ``cue``; what is shown depends on ``round_seed`` alone, so a round shares it."""
    shown = random.Random(round_seed).sample(_CUE_EXAMPLES, _CUES_SHOWN)
    return [turn for example, answer in shown for turn in (_CUE.format(cue=example), answer)] + [_CUE.format(cue=cue)]


# --- reading what came back ------------------------------------------------------------------------------------------

_LABEL = re.compile(r"[a-z]{3,16}")
_BULLET = re.compile(r"^\W*(?:\d{1,3}\s*[.):]\s*)?[-*•\s]*")
_BREAK = re.compile(r"\n+|(?<=[.!?])[\"”]?\s+(?=[\"“A-Z0-9])")
_META = re.compile(
    r"\b(AI|sentences?|labels?|answers?|clues?)\b|language model|\bI'm sorry\b|https?:|\*\*|[][<>{}|\\]|^[\w ]{1,20}:",
    re.IGNORECASE,
)
_LEANS = re.compile(
    r"(However|Therefore|Thus|Additionally|Furthermore|Moreover|But|And|So|Then|This|These|Those|That|One of)\b"
)


def parse_labels(text: str) -> list[str]:
    """Labels as written, in lower case: the first line with commas, after the topic's colon."""
    lines = [line for line in text.splitlines() if "," in line]
    listed = (lines[0] if lines else text).rpartition(":")[2]
    return [part.strip(" .;*\"'").lower() for part in listed.split(",")]


def choose_labels(
    found: Iterable[str], n: int, avoided: frozenset[str], known: Callable[[str], bool] = bool
) -> tuple[list[str], dict[str, int]]:
    """The first ``n`` usable labels, and how many were refused for which reason; ``known``: whether a label is a word."""
    chosen: list[str] = []
    refused: dict[str, int] = {}
    for label in found:
        if len(chosen) == n:
            break
        reason = ""
        if not _LABEL.fullmatch(label):
            reason = "label_not_one_word"
        elif any(same_word(label, other) for other in chosen):
            reason = "label_twice"
        elif any(label[:3] == other[:3] for other in chosen):  # small models play with beginnings: elixir, elitist, elist
            reason = "label_begins_alike"
        elif stem(label) in avoided:
            reason = "label_avoided"
        elif not known(label):
            reason = "label_not_known"
        if reason:
            refused[reason] = refused.get(reason, 0) + 1
        else:
            chosen.append(label)
    return chosen, refused


def split_sentences(text: str, cut: bool) -> tuple[list[str], int]:
    """Sentences without bullets and numbers; the last one of an answer that was cut off is not among them but counted."""
    parts = [" ".join(_BULLET.sub("", part).split()) for part in _BREAK.split(text)]
    parts = [part for part in parts if part]
    if cut and parts and parts[-1][-1] not in ".!?":
        return parts[:-1], 1
    return parts, 0


def sentence_fault(sentence: str, label: str, labels: Sequence[str], words: tuple[int, int]) -> str:
    """Why a sentence cannot be used; empty where it can. ``words``: fewest and most."""
    if sentence[-1] not in ".!?":
        return "sentence_unfinished"
    if not words[0] <= len(sentence.split()) <= words[1]:
        return "sentence_length"
    if not sentence.isascii() or not sentence.isprintable() or _META.search(sentence) or sentence.count('"') % 2:
        return "sentence_not_plain"
    if _LEANS.match(sentence):  # on a sentence that is not there
        return "sentence_leans_on_another"
    said = normalised(sentence).split()
    if len(set(said)) < 0.7 * len(said):
        return "sentence_repeats_itself"
    if mentions(sentence, label):
        return "sentence_names_label"
    if any(mentions(sentence, other) for other in labels if other != label):
        return "sentence_names_other_label"
    return ""


def without_subject(sentence: str, label: str) -> str:
    """``"A lion has a mane."`` → ``"It has a mane."``: small models begin every fact with what it is about.

    Only a subject is replaced: the label, after at most an article, followed by a verb that shows its number.
    """
    match = re.match(r"(?:(?:the|an?)\s+)?(\w+)\s+(is|are|has|have|can|may|was|were|lives?)\b", sentence, re.IGNORECASE)
    if not match or not same_word(match[1], label):
        return sentence
    many = match[2].lower() in ("are", "have", "were", "live") or match[1].lower() == label + "s"
    return f"{'They' if many else 'It'} {sentence[match.start(2) :]}"


_IRREGULAR = {"mice": "mouse", "teeth": "tooth", "feet": "foot", "geese": "goose", "children": "child", "people": "person"}


def stem(word: str) -> str:
    """A crude stem: lower case, without the endings of plural, past, -ing, -ly, -er; three letters stay at least."""
    word = _IRREGULAR.get(word.lower(), word.lower())
    word = word[:-2] + "an" if len(word) > 4 and word.endswith("men") else word  # women, firemen
    for ending in ("ings", "ing", "iness", "ness", "ily", "ly", "ies", "ied", "ier", "iest", "es", "ed", "s", "er", "est"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not (ending == "s" and word.endswith("ss")):
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] in "eyi":  # bake and baked, hurry and hurried
        word = word[:-1]
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":  # run and runn(ing)
        word = word[:-1]
    return word[:-1] + "f" if word[-1] == "v" else word  # knife and kniv(es)


def same_word(a: str, b: str) -> bool:
    return stem(a) == stem(b)


def mentions(sentence: str, label: str) -> bool:
    """Whether a word of the sentence is the label, a form of it, a compound that begins with it, or of its family."""
    root, label = stem(label), label.lower()
    family = label[: max(5, -(-3 * len(label) // 5))]  # laughter and laughing; too much rather than too little
    words = re.findall(r"[a-z]+", sentence.lower())
    return any(
        stem(w) == root or (len(label) > 3 and w.startswith(label)) or (len(label) > 5 and w.startswith(family)) for w in words
    )


def nearly_same(a: str, b: str) -> bool:
    """Whether two sentences share more than two thirds of their words."""
    first, second = set(normalised(a).split()), set(normalised(b).split())
    return 3 * len(first & second) > 2 * len(first | second)


def normalised(sentence: str) -> str:
    """What two sentences share that count as the same: words in lower case."""
    return " ".join(re.findall(r"[a-z0-9']+", sentence.lower()))
