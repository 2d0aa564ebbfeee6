"""Twenty prompts from 2 to about 350 tokens, of the kinds that users send."""

from __future__ import annotations


def _chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


_SYSTEM = (
    "<|im_start|>system\nYou are the clerk of a water mill. You answer in one or two sentences, "
    "you name the unit of every figure, and you say so when you do not know.<|im_end|>\n"
)
_STORY = (
    "The mill stood where the valley narrows, and the river had turned its wheel for two hundred "
    "years. In spring the water came brown and fast, and the miller closed the gate by a hand's "
    "breadth; in August it barely wet the stones, and he waited. "
)

PROMPTS = [
    "Hello",
    "Once upon a time",
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n    ",
    "Q: Why is the sky blue?\nA:",
    "Ein Wasserrad dreht sich, weil",
    "SELECT name, COUNT(*) FROM",
    _chat("What is gravity?"),
    _chat("Write a haiku about rivers."),
    _chat("Translate 'good morning' into French."),
    _chat("List three prime numbers above 10."),
    _SYSTEM + _chat("How much does a sack of flour weigh?"),
    _SYSTEM + _chat("When does the mill open?"),
    _SYSTEM + _chat("Who invented the turbine?"),
    "import asyncio\n\nasync def main():\n    reader, writer = await asyncio.open_connection(",
    _STORY + "One day",
    _STORY * 2 + "Summary:",
    _chat("Shorten this text to one sentence: " + _STORY * 3),
    _STORY * 5 + "\nThe moral of the story is",
]
