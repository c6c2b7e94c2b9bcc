"""Writes the demo's preference pairs, train.jsonl and eval.jsonl, from the hand-written facts in facts.txt.

The preference is "answer at once, in one plain sentence": the chosen response is the fact, the rejected one says the
same fact amid preamble, hedging and offers of more help. Every question of the held-out file is absent from the
training file. The same files come out on every machine:

    python examples/demo/make_pairs.py

The facts, the wording and the pairs were written for this project and are under its licence, Apache-2.0.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NUM_EVAL = 48
PAIRS_PER_FACT = 4
SEED = 2403

OPENERS = (
    "What a wonderful question! I am always glad when somebody asks me about {topic}.",
    "Thank you so much for reaching out to me with your question about {topic}!",
    "Great question! There is a lot that could be said about {topic}, so let me take it step by step.",
    "I would be more than happy to help you with {topic} today, as best I can.",
    "That is a really interesting thing to ask, and you are certainly not the only one to wonder about {topic}.",
    "Ah, {topic}! This is a subject that has fascinated many people over the years.",
    "Before I answer, let me say that I appreciate your interest in {topic}.",
    "When it comes to {topic}, there are many things that one could take into account.",
    "Let us take a moment to think carefully about {topic} together.",
    "Sure, I can certainly help with that! You would like to know more about {topic}, if I understand you correctly.",
    "As an AI language model, I have come across quite a lot of material about {topic}.",
    "It is good that you ask about {topic}, because this is something that people often get confused about.",
    "Hello there! I hope that you are having a lovely day, and thank you for asking about {topic}.",
    "Well, {topic} can be looked at from several angles, and each of them has its merits.",
    "Excellent question, and a very thoughtful one! I will do my best to shed some light on {topic}.",
    "In order to give you a complete answer about {topic}, allow me to begin with a little background.",
)

LEADS = (
    "",
    "",
    "Generally speaking, here is what I can tell you. ",
    "To put it in simple terms, it comes down to this. ",
    "With that said, this is what most sources seem to suggest. ",
    "All things considered, the short version would be as follows. ",
    "As far as I am aware, the following holds. ",
    "After weighing it all up, I would say this. ",
)

HEDGES = (
    "Of course, there is always more to the story, and the details can differ depending on whom you ask.",
    "Please keep in mind that I may be mistaken, so it could be wise to check this with another source.",
    "That being said, there may well be exceptions that I have not thought of here.",
    "It should be noted that this is only a general overview and may not cover every case.",
    "Naturally, this is a simplified way to put it, and one could go into far more depth.",
    "It is worth mentioning that opinions on such matters can vary from one person to the next.",
)

KIND_HEDGES = {
    "place": (
        "Please bear in mind that borders, names and figures can change over time, so an up-to-date atlas may help.",
        "Geography is a vast and complex field, and there are many other places that deserve a mention too.",
    ),
    "science": (
        "The science behind this is rather intricate, of course, and researchers continue to study it in detail.",
        "Under other conditions things might turn out a little differently, so please treat this with some care.",
    ),
    "nature": (
        "Nature is full of surprises, however, and biologists may well describe this in a more nuanced way.",
        "There are countless species on our planet, so it is hard to make any statement that fits them all.",
    ),
    "body": (
        "However, I am not a doctor, and every body is different, so you may wish to consult a professional.",
        "Please remember that this is general information only and does not replace the advice of your physician.",
    ),
    "cooking": (
        "Every kitchen and every cook is different, though, so you may have to experiment to find what suits you.",
        "Tastes do vary a great deal, and some chefs may recommend a completely different approach.",
    ),
    "home": (
        "Results may vary with the materials at hand, so please proceed with caution and at your own risk.",
        "There are many other methods as well, and it may be best to ask an expert if you feel unsure.",
    ),
    "word": (
        "Language is always evolving, though, and usage may differ between regions, registers and style guides.",
        "Linguists could tell you much more about how this came to be, as it is quite a rich subject.",
    ),
    "past": (
        "History is complex, of course, and historians do not always agree on every aspect of such events.",
        "There is a great deal of context around this that would be well worth exploring at another time.",
    ),
    "number": (
        "Numbers can be tricky, however, so you may want to double-check this with a calculator to be safe.",
        "Mathematics offers many ways to arrive at such a result, and each of them can be instructive.",
    ),
    "tech": (
        "Technology changes quickly, though, so the details may depend on your device and its version.",
        "If you are unsure, it may be advisable to consult the manual or to contact customer support.",
    ),
    "life": (
        "Everyone is different, of course, so what works for others may or may not apply in your case.",
        "There may be other views on this, and it is entirely up to you which of them you follow.",
    ),
}

CLOSERS = (
    "I hope that this helps! Please let me know if there is anything else that you would like to know.",
    "If you have any further questions, please do not hesitate to ask, and I will gladly assist you.",
    "Would you like me to go into more detail, or is there something else that I can help you with?",
    "Feel free to reach out again at any time, as I am always here to help you.",
    "Do let me know whether this answers your question or whether I should explain it more fully!",
    "I trust that this is useful to you, and I wish you a wonderful rest of your day!",
    "Should you wish to explore this topic further, I would be delighted to suggest some more reading.",
    "Is there any other aspect of this that you are curious about? I am happy to continue.",
    "Thanks again for asking, and please come back whenever you have another question for me!",
    "Let me know if you want examples, tips or a longer explanation, and I will be glad to provide them.",
)


@dataclass(frozen=True)
class Fact:
    """One line of facts.txt.

    Attributes:
        kind: Which of ``KIND_HEDGES`` suits it.
        topic: What it is about, as a noun phrase.
        questions: Two ways to ask for it.
        answer: The fact, in one sentence.
    """

    kind: str
    topic: str
    questions: tuple[str, str]
    answer: str


def read_facts(path: Path) -> list[Fact]:
    """Reads the facts, one a line with five fields between ``|`` signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if not line.startswith("#")]
    return [Fact(kind, topic, (question, other), answer) for kind, topic, question, other, answer in rows]


def long_winded(fact: Fact, rng: random.Random) -> str:
    """Says the fact with two or three of a preamble, a lead-in, hedging and an offer of help, drawn from ``rng``."""
    opener = rng.choice(OPENERS).format(topic=fact.topic)
    opener = opener[0].upper() + opener[1:]
    hedge = rng.choice(HEDGES + 2 * KIND_HEDGES[fact.kind])
    closer = rng.choice(CLOSERS)
    shape = rng.randrange(3)
    if shape == 0:
        return f"{opener} {rng.choice(LEADS)}{fact.answer} {hedge}"
    if shape == 1:
        return f"{opener} {rng.choice(LEADS)}{fact.answer} {closer}"
    return f"{rng.choice(LEADS[2:])}{fact.answer} {hedge} {closer}"


def make_pair(fact: Fact, question: str, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """Makes one row in the layout with an explicit prompt."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": fact.answer}],
        "rejected": [{"role": "assistant", "content": long_winded(fact, rng)}],
    }


def main() -> None:
    """Writes both files beside this one."""
    rng = random.Random(SEED)
    facts = read_facts(FOLDER / "facts.txt")
    rng.shuffle(facts)
    held_out, learned = facts[:NUM_EVAL], facts[NUM_EVAL:]
    train = [make_pair(fact, fact.questions[i % 2], rng) for i in range(PAIRS_PER_FACT) for fact in learned]
    rng.shuffle(train)
    evaluation = [make_pair(fact, fact.questions[i % 2], rng) for i, fact in enumerate(held_out)]
    for name, pairs in (("train", train), ("eval", evaluation)):
        path = FOLDER / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
        print(f"{path.name}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
