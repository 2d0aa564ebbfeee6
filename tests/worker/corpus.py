"""Texts on which tokenizers differ."""

from __future__ import annotations

import random


def _noise(seed: int) -> str:
    """Letters, digits, whitespace, punctuation and symbols of many scripts, mixed."""
    source = random.Random(seed)
    alphabet = (
        "aábcßdeéfgĞhıjK'sStT 0123456789  \t\n\r\n.,;:!?-_()[]{}<>|/\\\"'`~@#$%^&*+="
        "абвгД中文字かなカナ한국어العربيةעבריתไทย😀👩‍👩‍👧🇩🇪½²Ⅳ٣\u00a0\u2003\u200d\ufeff\x00\x7f…–“”"
    )
    return "".join(source.choice(alphabet) for _ in range(source.randrange(1, 80)))


HARD_TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    " \n \t\r\n  ",
    "Hello, world!",
    " leading and trailing ",
    "a  b   c    d",
    "tabs\tand\t\ttabs",
    "don't I'll we've they're IT'S He'D i'M",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-10",
    "item 1.\n\n2. second  3 third   44\n 5\n\n6",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "naïve café résumé Ångström ﬁ ligature ＦＵＬＬ width",
    "e\u0301 versus é, n\u0303 versus ñ",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم",
    "你好,世界。日本語のテキスト、そして한국어 텍스트 ภาษาไทย",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 ☃️ 1️⃣",
    "\u00a0non\u00a0breaking\u2003em\u200bzero\ufeffbom",
    "control \x00\x01\x1f\x7f characters",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> <|im_end|>x<|endoftext|>",
    "<|im_start <|im_end| >|<|begin|><|end|> <repo_name>file.py",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n\n\n",
    'for (int i=0;i<10;++i){printf("%d\\n",i);}',
    "https://example.com/a?b=c&d=%20e#f user@example.org",
    "$\\frac{a}{b} \\leq \\sum_{i=1}^{n} x_i^2$",
    "!!!???...,,,---___===***",
    "ĠtheĠĊ Ġ Ċ",
    "x" * 300,
    "ab " * 100,
    " " * 70 + "end",
    "½ ² Ⅳ ٣ ௧ 𝟘 ①",
    "\U0001f600\U0010fffd\ud7ff",
    *map(_noise, range(120)),
]
