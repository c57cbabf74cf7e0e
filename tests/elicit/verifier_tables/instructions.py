"""(check, answers that pass, answers that fail)"""


def rules(**rules) -> dict:
    return {"type": "instructions", "rules": rules}


TABLE = [
    (rules(words=3), ["one two three", "**one** two - three", "- one\n- two\n- three", "don't do it", "<think>one</think>one two three", "猫と犬", "我爱猫", "раз, два, три", "एक दो तीन", "واحد، اثنان، ثلاثة", "둘 셋 넷", "我 like 猫", "один — два — три"], ["one two", "one two three four", "我爱", "我爱猫咪", "", "<think>one two three", "- - -", "<think>a b</think>c"]),
    (rules(sentences=2), [
        "One. Two!", "Pi is 3.14 today. Yes.", "Dr. Smith came. He left.", "It is e.g. red. Or blue.", "Well... maybe. No.", "我爱猫。你呢？", "猫です。犬です。", "यह है। वह है।", "هل هذا؟ نعم.", "«Да!» Нет.", "“Really?” she asked. “No.”", "Er kam z. B. heute. Gut.", "1. One is here.\n2. Two is there.", "He met J. R. Smith. He left.", "**One.** Two.", "One.\nTwo.",
        "Prices rose by approx. 3 percent. Then they fell.", "Mr. and Mrs. Lee came. Hi!", "他说：“你好。”我走了。", "È bello. Sì!", "What?! No.", "I like U.S. films. You don't.", "In fig. 2 it is red. In Fig. 3 it is not.",
    ], ["One.", "One", "One. Two. Three.", "我爱猫。", "Pi is 3.14.", "Dr. Smith came.", "Well... maybe.", "यह है।", "猫です。犬です。鳥です。", "Hm... No... Well.", "example.com is down.", "See https://a.b/c. Ok. Done."]),
    (rules(paragraphs=2), ["a\n\nb", "a\nb\n\nc", "a\n \nb", "a\n***\nb", "a\n\n---\n\nb", "a\r\n\r\nb", "一。\n\n二。", "a\n\n***\n\nb", "a\n\n\n\nb\n\n"], ["a", "a\nb", "a\n\nb\n\nc", "a\n\n---", "a\n\n***\n\n---\n\n"]),
    (rules(bullets=2), ["- a\n- b", "* a\n* b", "• a\n• b", "+ a\n+ b", "- a\n  - b", "● a\n● b", "・猫\n・犬", "•أ\n•ب", "– a\n– b", "Sure:\n- a\n- b\n\n---\nDone.", "- **a**: x\n- **b**: y", "◦ a\n▪ b", "- a\n- b\n* * *"], ["- a", "- a\n- b\n- c", "1. a\n2. b", "**a**\n**b**", "---\n- a", "-a\n-b", "* * *\n- - -", "— Привет!\n— Пока!", "- \n- "]),
    (rules(numbered=2), ["1. a\n2. b", "1) a\n2) b", "(1) a\n(2) b", "**1.** a\n**2.** b", "**1. a**\n**2. b**", "### 1. a\n### 2. b", "１．猫\n２．犬", "1、猫\n2、犬", "1.苹果\n2.香蕉", "१. एक\n२. दो", "١. أ\n٢. ب", "①猫\n②犬", "1\\. a\n2\\. b", "1. a\n   - x\n2. b", "٢- ب\n٣- ج"], ["1. a", "- a\n- b", "3.14\n2.72", "1 a\n2 b", "2024\n2025", "a 1.\nb 2.", "1. a\n2. b\n3. c", "1.\n2."]),
    (rules(**{"with": ["red"]}), ["a Red car", "_red_", "**red**", "red-hot", "RED!", "ＲＥＤ", "«red»", "il dit red。", "这是red的"], ["a reddish car", "bored", "<think>red</think>blue", "r e d", "rot"]),
    (rules(**{"with": ["苹果", "café", "don't", "машина"]}), ["我吃苹果。café don't машина", "苹果派, cafe\u0301, don’t, Машина", "(苹果) CAFÉ DON'T «машина»"], ["苹 果 café don't машина", "苹果 cafe don't машина", "苹果 café dont машина", "苹果 café don't машинами", "café don't машина"]),
    (rules(without=["red", "사과"]), ["a reddish car", "파인애플사과나무", "blue", "<think>red</think>blue"], ["_red_", "a Red car", "사과는 달다", "red.", "cafe r\u200bed red", "The ＲＥＤ"]),
    (rules(letter={"letter": "é", "least": 2}), ["été", "e\u0301te\u0301", "ÉTÉ", "pré, né"], ["ete", "été".replace("é", "e", 1), "é", "èè"]),
    (rules(letter={"letter": "s", "most": 1}), ["Straße", "eins", "<think>ssss</think>s"], ["ss", "Strasse", "S s"]),
    (rules(word={"word": "猫", "least": 2}), ["猫和猫", "猫猫", "**猫** 猫"], ["猫", "犬", "<think>猫猫</think>猫"]),
    (rules(word={"word": "so", "most": 1}), ["so also", "_so_", "sofa, also"], ["so so", "_so_ so", "So, so!"]),
    (rules(capitals=1), ["the BBC I", "ÉCOLE verte", "МОСКВА зимой", "_NASA_ said", "E\u0301COLE", "ΑΒΓ δ", "COVID-19"], ["none", "The Bbc", "BBC and ITV", "École", "中文", "I A"]),
    (rules(case="lower"), ["all low 1", "école", "москва", "straße", "猫 is low"], ["All low", "ÉCOLE", "Москва", "123", "猫", "iPhone"]),
    (rules(case="upper"), ["ALL UP 1", "ÉCOLE!", "МОСКВА", "<think>no</think>YES"], ["All up", "éCOLE", "猫", "!!", "YES i"]),
    (rules(commas=0), ["none here", "猫。犬。", "<think>a, b</think>a"], ["one, here", "猫，犬", "قط، كلب", "猫、犬", "1,000"]),
    (rules(begins="I'm Ève"), ["I'm Ève.", "I’m Ève!", " i'm E\u0300ve", "<think>Hm</think>\n\nI'm Ève", "I'm\nÈve"], ["**I'm Ève**", "I am Ève", "Hi, I'm Ève", "I'm Eve"]),
    (rules(ends="Is it? C'est fini."), ["Bye. Is it? C'est fini.", "“Is it? C’est fini.”", "Is it?\nC'est fini.\n", "« Is it? c'est fini. »"], ["Is it? C'est fini. Bye", "C'est fini.", "Is it? C'est fini"]),
    (rules(quoted=True), ['"so"', "“so”", "„so“", "«so»", "« so »", "「猫」", "『猫』", "<think>x</think>\"so\"", "＂so＂", "”så”"], ["so", '"so', "so\"", "'so'", '"', "「猫", 'He said "so"', "“so” he said"]),
    (rules(json=True), ['{"a": 1}', '```json\n{"a": 1}\n```', "[1]", "<think>{</think>{}", '```\n{"名": "猫"}\n```'], ["{a}", 'Here: {"a": 1}', '```json\n{"a": 1}\n```\nDone', "{'a': 1}", '{"a": 1,}']),
    (rules(title=True), ["<<A title>>\ntext", "<<猫>>", "text <<Ça>>"], ["A title", "<A title>", "<<>>", "«A title»", "<<A\ntitle>>"]),
    (rules(highlighted=2), ["*a* and *b*", "**a** and **b**", "***a*** and *b*", "- *a*\n- *b*", "* item *a*\n* item *b*", "*猫*和*犬*"], ["*a*", "* a\n* b", "2 * 3 * 4 * 5 * 6", "** **", "*a* *b* *c*", "a b"]),
    (rules(placeholders=1), ["Dear [name]", "［名前］様", "尊敬的【姓名】", "[имя]", "Dear [your name], see [here](https://example.org)", "- [ ] call [name]"], ["Dear name", "[a] [b]", "[]", "[ ] do it", "see [here](https://example.org)", "<name>"]),
    (rules(postscript="P.S."), ["text\nP.S. more", "P.S. more", "text\n\n**P.S.** more", "text\n  p.s. more", "text\n*P.S. more*"], ["text P.S. more", "PS more", "text", "<think>\nP.S. x</think>y"]),
    (rules(sections={"named": "Part", "least": 2}), ["Part 1\nx\nPart 2", "**Part 1**\nx\n**Part 2**", "# Part I\nx\n## Part II: y", "Part One\nx\nPart Two", "PART 1: a\nPART 2: b", "Part A. x\nPart B. y", "Part １\nPart ２"], ["Part 1", "Part of it.\nPart of that.", "see Part 1 and Part 2", "Parts 1\nParts 2", "<think>Part 1\n</think>Part 2"]),
    (rules(sections={"named": "第", "least": 2}), ["第1章\n猫\n第2章\n犬", "## 第１章\n## 第２章"], ["第1章", "第\n第"]),
    (rules(parts=2), ["a ****** b", "a\n******\nb", "猫******犬", "a\n\n******\n\nb\n"], ["a", "a ****** b ****** c", "a *** b", "****** a"]),
    (rules(repeats="Say “it” — now"), ["Say “it” — now: done", 'say "it" — now\nDone', "<think>it</think>Say  “it”\n— now. x"], ["done: Say “it” — now", "Say it now", "**Say “it” — now**"]),
    (rules(words={"most": 4}, commas=0, begins="Dear") | {"loose": True}, ["Dear all", "**Dear all**", "Sure:\nDear all", "Sure, here:\n*Dear* all\nHope it helps, bye"], ["all", "Sure, no\nDear, x\nbye", "Sure:\nHi Dear all\nbye", ""]),
]  # fmt: skip
