"""(check, answers that pass, answers that fail). Each answer that holds a program costs a process in the sandbox, so
there are few more than 40 of both."""


def tests(*lines: str) -> dict:
    return {"type": "unit_tests", "tests": "\n".join(lines)}


DOUBLE = tests("assert double(4) == 8", "assert double(-1) == -2")
BIG = tests("assert Solution().count('ab') == 2")
CODE = "def double(x):\n    return 2 * x"
BAD = "def double(x):\n    return x ** 2"
TICKS = "```"

TABLE = [
    (DOUBLE, [
        CODE, f"{TICKS}python\n{CODE}\n{TICKS}", f"{TICKS}\n{CODE}\n{TICKS}", f"{TICKS}py\n{CODE}\n{TICKS}", f"{TICKS}python3\n{CODE}\n{TICKS}", f"{TICKS}Python\n{CODE}\n{TICKS}", f"{TICKS} python\n{CODE}\n{TICKS}", f"{TICKS}python\n{CODE}", f"~~~python\n{CODE}\n~~~", f"````python\n{CODE}\n````",
        f'{TICKS}python title="double.py"\n{CODE}\n{TICKS}', f"{TICKS}{{.python}}\n{CODE}\n{TICKS}", f"Sure!\n\n{TICKS}python\n{CODE}\n{TICKS}\n\nThis doubles `x`. Hope it helps!", f"<think>\n{TICKS}python\n{BAD}\n{TICKS}\nno\n</think>\n\n{TICKS}python\n{CODE}\n{TICKS}",
        f"First:\n{TICKS}bash\npip install numpy\n{TICKS}\nthen\n{TICKS}python\n{CODE}\n{TICKS}", f"Output will be:\n{TICKS}\n8\n{TICKS}\nfrom\n{TICKS}python\n{CODE}\n{TICKS}", f"{TICKS}python\n{CODE}\n{TICKS}\nUsage:\n{TICKS}python\nprint(double(input()))\n{TICKS}", f"{TICKS}python\n{CODE}\n{TICKS}\nOutput:\n{TICKS}\n8\n{TICKS}",
        f"1. Write:\n   {TICKS}python\n   def double(x):\n       return 2 * x\n   {TICKS}\n2. Done.", f"[PYTHON]\n{CODE}\n[/PYTHON]", f"{TICKS}python\r\ndef double(x):\r\n    return 2 * x\r\n{TICKS}\r\n", f"这是代码：\n{TICKS}python\n# 加倍\ndef double(数):\n    return 2 * 数\n{TICKS}\n希望有帮助。", f"Вот код:\n{TICKS}python\n{CODE}\n{TICKS}",
        f'{TICKS}python\n{CODE}\n\nif __name__ == "__main__":\n    print(double(int(input())))\n{TICKS}', f"{TICKS}python\n{CODE}\nprint(double(2), 'é', '猫')\n{TICKS}", "double = lambda x: x + x", f"{TICKS}python\nfrom typing import List\nimport math, re, json, collections\n{CODE}\n{TICKS}",
        f'{TICKS}python\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Pair:\n    one: int\n    two: "int" = 0\ndef double(x):\n    return Pair(x, x).one * 2\n{TICKS}', f'{TICKS}python\ndef double(x):\n    """Doubles.\n\n    {TICKS}\n    double(2)\n    {TICKS}\n    """\n    return 2 * x\n{TICKS}',
        f"{TICKS}python\nimport asyncio\nasync def two(x):\n    return 2 * x\ndef double(x):\n    return asyncio.run(two(x))\n{TICKS}", f"{TICKS}python\nimport pickle\nclass Box:\n    def __init__(self, x):\n        self.x = x\ndef double(x):\n    return pickle.loads(pickle.dumps(Box(x))).x * 2\n{TICKS}", f"<answer>\n{TICKS}python\n{CODE}\n{TICKS}\n</answer>",
        f"{TICKS}python\ndef double(x: int | float) -> int | float:\n    match x:\n        case 0:\n            return 0\n        case _:\n            return x << 1\n{TICKS}", f"> {TICKS}python\n> def double(x):\n>     return 2 * x\n> {TICKS}", f"{TICKS}python\n{CODE}\n{TICKS}\n{TICKS}python\n{BAD}\n{TICKS}",
    ], [
        "", "2 * x", "I can't.", BAD, f"{TICKS}python\n{BAD}\n{TICKS}", f"{TICKS}python\n{BAD}\n{TICKS}\n{TICKS}python\n{CODE}\n{TICKS}", f"<think>{TICKS}python\n{CODE}\n{TICKS}</think>I can't.", f"<think>{TICKS}python\n{CODE}\n{TICKS}", f"{TICKS}python\ndef double(x):\nreturn 2 * x\n{TICKS}", f"{TICKS}python\ndef double(x)\n    return 2 * x\n{TICKS}",
        f"{TICKS}python\ndef Double(x):\n    return 2 * x\n{TICKS}", f"{TICKS}python\nprint(8)\n{TICKS}", f"{TICKS}python\nimport sys\nsys.exit(0)\n{TICKS}", f"{TICKS}python\nimport os\nos._exit(0)\n{TICKS}", f"{TICKS}python\nraise SystemExit\n{TICKS}", f"{TICKS}python\ndef double(x):\n    return str(2 * x)\n{TICKS}", f"{TICKS}python\ndef double(x):\n    print(2 * x)\n{TICKS}",
        f"{TICKS}python\ndef double(x):\n    return 8\n{TICKS}", f"{TICKS}python\nimport numpy as np\n{CODE}\n{TICKS}", f"{TICKS}python\nx = int(input())\n{CODE}\n{TICKS}", f"{TICKS}javascript\nfunction double(x) {{ return 2 * x }}\n{TICKS}", f"{TICKS}python\n>>> def double(x):\n...     return 2 * x\n{TICKS}", f"{TICKS}python\ndef double（x）:\n    return 2 * x\n{TICKS}",
        f"{TICKS}python\ndef double(x):\n\u00a0\u00a0\u00a0\u00a0return 2 * x\n{TICKS}", f"{TICKS}python\ndef double(x):\n    return double(x)\n{TICKS}", f"{TICKS}python\ndef double(x):\n    pass  # TODO\n{TICKS}", f"{TICKS}python\ndef double(x):\n    ...\n{TICKS}", f"{TICKS}python\nclass Solution:\n    def double(self, x):\n        return 2 * x\n{TICKS}",
        f"{TICKS}python\ndef double(x):\n    raise NotImplementedError\n{TICKS}", f"{TICKS}python\ndef double(x, y):\n    return 2 * x\n{TICKS}", f"{TICKS}python\nasync def double(x):\n    return 2 * x\n{TICKS}", f"{TICKS}python\ndef double(x):\n    yield 2 * x\n{TICKS}", f"{TICKS}python\ndef double(x):\n\treturn 2 * x\n        return x\n{TICKS}",
        f"{TICKS}python\ndef double(x):\n    return int(2 * x + 0.5)\n{TICKS}", f"{TICKS}python\n{CODE}\nassert double(2) == 5\n{TICKS}", f"{TICKS}python\n{CODE}\ndel double\n{TICKS}", f"{TICKS}python\nprint 'x'\n{CODE}\n{TICKS}", f"{TICKS}bash\npython double.py\n{TICKS}", "答案是 8。", "<<<" + CODE, f"{TICKS}python\n{TICKS}",
    ]),
    (BIG, [
        f"{TICKS}python\nclass Solution:\n    def count(self, text: str) -> int:\n        return len(text)\n{TICKS}", f"{TICKS}python\nfrom typing import *\nfrom functools import lru_cache\nclass Solution:\n    @lru_cache(None)\n    def count(self, text: 'str') -> 'int':\n        return sum(1 for _ in text)\n{TICKS}",
        f"{TICKS}python\nfrom enum import Enum\nfrom typing import NamedTuple\nclass Kind(Enum):\n    A = 2\nclass Solution(NamedTuple):\n    n: int = 2\n    def count(self, text):\n        return Kind.A.value\n{TICKS}", f"{TICKS}python\nimport sys\nsys.setrecursionlimit(10**5)\nclass Solution:\n    def count(self, t):\n        return 1 + self.count(t[1:]) if t else 0\n{TICKS}",
        f"{TICKS}python\nfrom __future__ import annotations\nfrom typing import get_type_hints\nclass Solution:\n    def count(self, text: str) -> int:\n        return len(get_type_hints(Solution.count))\n{TICKS}", "class Solution:\n    def count(self, text):\n        return len(text)",
    ], [f"{TICKS}python\nclass Solution:\n    def count(self, text):\n        return 3\n{TICKS}", "Solution", f"{TICKS}python\nclass Solution:\n    def count(text):\n        return 2\n{TICKS}"]),
]  # fmt: skip
