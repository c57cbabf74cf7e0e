"""(check, answers that pass, answers that fail) of the types set, order and contains"""

RED = {"type": "set", "items": ["red", "Blue"]}
MIXED = {"type": "set", "items": ["salt and pepper", "Paris, France", "tea"]}
ORDER = {"type": "order", "items": ["one", "two", "three"]}
KANJI = {"type": "order", "items": ["一月", "二月", "三月"]}
PARIS = {"type": "contains", "all": ["paris", "12"]}
CODE = {"type": "contains", "all": ["print(", "[0]"]}
CAFE = {"type": "contains", "all": ["café"]}
PAIR = {"type": "order", "items": ["one", "two"]}
DATES = {"type": "order", "items": ["2019-11-20", "2020-02-14"]}

TABLE = [
    (RED, ["blue, red", "- Red\n- blue", "red and blue", "1. red\n2. blue", "red; blue", "red、blue", "rot".replace("rot", "red") + " und Blue", "Red y Blue", "red，blue", "<think>green</think>red, blue"], ["red", "red, blue, green", "red, blue, red", "", "red or blue", "reddish, blue", "not red, blue", "<think>red, blue"]),
    (MIXED, ["salt and pepper, tea, Paris, France", "tea; Paris, France; Salt and Pepper", "- tea\n- salt and pepper\n- Paris, France"], ["salt, pepper, tea, Paris, France", "tea, Paris, salt and pepper", "salt and pepper, tea"]),
    (ORDER, ["one two three", "One, then two, then three.", "three, one, two sorted is: one, two, three", "one, two, three: one is least", "**one** < _two_ < three", "1. one\n2. two\n3. three", "<think>three two one</think>one two three"], [
        "one three two", "two one three", "one two", "", "someone twofold threefold", "one, two, three. No: three, two, one", "three two one", "one, two, three; one, three, two; two, one, three; one, two, three", "<think>one two three", "two one two three one"]),
    (KANJI, ["一月、二月、三月", "一月二月三月です", "順番は一月→二月→三月"], ["三月、二月、一月", "一月、三月、二月", "一月と二月"]),
    (PAIR, ["one two"], ["two one"]),
    (DATES, ["2019-11-20, 2020-02-14", "first 2019-11-20 and last 2020-02-14"], ["2020-02-14, 2019-11-20", "2019-11-201, 2020-02-14"]),
    (PARIS, ["Paris has 12 gates", "12 in PARIS.", "Parisian 12", "(paris) 12x", "«Paris», 12", "<think>no</think>Paris 12"], ["comparison of 12", "Paris 112", "Paris 120", "Paris", "12", "<think>Paris 12</think>London", "<think>Is it Paris? 12?</think>It is London.", "<think>Paris 12", "unparis 12"]),
    (CODE, ["print(x[0])", "```python\nprint(a[0])\n```", "PRINT( y[0]", "sys.print(x[0])"], ["sprint(x[0])", "print x[0]", "print(x[1])", "print(x[10])"]),
    ({"type": "set", "items": ["3", "-7"]}, ["3, -7", "- 3\n- -7", "• 3\n• -7"], ["3, 7", "-3, -7"]),
    ({"type": "set", "items": ["1.5", "2"]}, ["1.5, 2", "1. 1.5\n2. 2"], ["5, 2"]),
    ({"type": "contains", "all": ["12"]}, ["it is 12.", "12, 13", "1,12", "12.05.2024", "- 12", "10-12"], ["12.5", "1.12", "12,000", "-12", "-$12"]),
    ({"type": "contains", "all": ["2024", "3.11"]}, ["12.05.2024 with 3.11.4"], ["2024"]),
    (CAFE, ["un café", "cafe\u0301 noir", "CAFÉ", "cafés", "le «café»"], ["cafe", "décafé", "caf\u00e8"]),
]  # fmt: skip
