"""(check, answers that pass, answers that fail)"""

MILL = ["The mill was built in 1820.", "It ground corn for a century.", "Bees live there now."]
TWO = {"type": "citations", "passages": MILL, "gold": [1, 2]}
BOTH = TWO | {"all": True}
ANY = {"type": "citations", "passages": MILL}
NONE = {"type": "citations", "passages": MILL, "answerable": False}
HAN = {"type": "citations", "passages": ["蜜蜂住在磨坊里。", "磨坊建于1820年。"], "gold": [2]}
RUSSIAN = {"type": "citations", "passages": ["Мельница построена в 1820 году.", "Там живут пчёлы."], "gold": [1]}
CAFE = {"type": "citations", "passages": ["Le café n'ouvre qu'à midi."]}

TABLE = [
    (TWO, [
        "In 1820 [1].", "In 1820 [1][2].", "In 1820 [1, 2].", "In 1820 [1,2]", "In 1820 [1-2].", "In 1820 [1–2].", "In 1820 [1; 2].", "In 1820 [1] and [2].", "In 1820 [ 1 ].", "In 1820 【1】.", "1820年［１］。", "In 1820 【1†source】.", "In 1820 [^1].", "In 1820 [[1]](#1).", "In 1820 [1](#ref1).",
        "In 1820 \\[1\\].", "In 1820 [Passage 1].", "In 1820 [Source: 2].", "In 1820 [Doc 1, Doc 2].", "في عام ١٨٢٠ [١].", "सन् १८२० में [१]।", "**1820** [1]", "<think>[3]?</think>In 1820 [1].", 'It "ground corn" [2], built in 1820 [1].', "It “ground corn” [2].", "Sie „ground corn“ [2].", "Il « ground corn » [2].",
        'It "ground … for a century" [2].', 'It "ground corn [...] century" [2].', 'It "ground corn ... a century" [2].', '"[I]t ground corn" [2].', 'The mill "was built in 1820." [1]', '"The mill was built [1] in 1820" [1].', 'The 12" wheel and the 14" wheel turn [1].', "It’s from 1820 [1], isn’t it [2]?",
        '"It ground\ncorn" [2]', "The mill's '20s [1]",
    ], [
        "", "In 1820.", "In 1820 [3].", "In 1820 [1][7].", "In 1820 [1, 3].", "In 1820 [1-3].", "In 1820 [0].", "In 1820 (1).", "In 1820 1.", "In 1820 [1, 7].", "In 1820 [n].", "In 1820 【3】.", "In 1820 [Passage 3].", "<think>[1]</think>In 1820.", "<think>In 1820 [1]", 'It "burned down" [1].', "It “burned down” [1].",
        "Sie „burned down“ [1].", "Elle « burned down » [1].", "それは「burned down」[1]。", 'It "ground corn" [1].', 'It "built in 1820. It ground corn" [1][2].', 'It "ground … corn in 1820" [1][2].', 'It "was built in 182" [1].', 'It "round corn" [2].', 'Built "in 1830" [1].', "[2019]", "In 1820 [1][2][3].", "[١٢]", "In 1820 [1 to 3]",
        'It "century … ground corn" [2].', "In 1820 [99999].", 'It “ground corn” "and wheat" [2].',
    ]),
    (BOTH, ["So [1] and [2].", "So [2][1].", "So [1, 2].", "So [1-2].", "所以【1】【2】。"], ["So [1].", "So [2].", "So [1][2][3].", "So.", "So [1-3]."]),
    (ANY, ["So [3].", "So [1-3].", "So [1], [2], [3]"], ["So [4].", "So [1-4].", "So.", "So [3-1]."]),
    (NONE, [
        "The passages do not say.", "The passages don't say.", "The passages don’t mention it.", "I can't answer that from the passages.", "I cannot answer this question.", "This can't be answered.", "It is not mentioned in the passages.", "The text does not provide this information.", "There is no information about it.",
        "The answer is not given.", "The passages contain no answer.", "Not enough information.", "It is impossible to say from these passages.", "The date is not specified.", "I don't know.", "It cannot be determined.", "None of the passages mentions it.", "Unanswerable.", "<think>[1]?</think>They do not say.",
        "Die Texte sagen das nicht.", "Das wird nicht erwähnt.", "Das lässt sich nicht beantworten.", "Les passages ne le disent pas.", "Ce n'est pas mentionné.", "Aucune information à ce sujet.", "Los textos no lo mencionan.", "No se menciona.", "No hay información.", "O texto não menciona isso.", "Il testo non lo dice.",
        "В текстах об этом не говорится.", "Нет информации.", "Это не указано.", "文中没有提到。", "無法回答這個問題。", "无法根据给定的段落回答。", "本文には記載されていません。", "情報がありません。", "答えられません。", "본문에 언급되어 있지 않습니다.", "알 수 없습니다.", "لا يذكر النص ذلك.", "لا توجد معلومات.", "غير مذكور", "इसका उल्लेख नहीं है।", "जानकारी नहीं दी गई है।",
    ], [
        "", "In 1820.", "They do not say [1].", "Yes.", "I can answer that: in 1820.", "It was built in 1820, no doubt.", "The mill does not matter: 1820.", "建于1820年。", "В 1820 году.", "1820年です。", "في عام ١٨٢٠", "<think>They do not say.</think>In 1820.", "<think>They do not say.", "They do not say 【1】.", "文中没有提到［１］。",
        "Nicht 1820, sondern 1821.", "Pas en 1820 mais en 1821.", "The answer is 1820.", "The passages say 1820.", "1820년입니다.", "सन् १८२० में।", "It is well known.",
    ]),
    (HAN, ["建于1820年[2]。", "建于1820年【2】。", "建于1820年［２］。", "文中说“磨坊建于1820年”[2]。", "文中说「磨坊建于1820年」[2]。", '文中说"磨坊建于"[2]', "文中說『1820年』[2]"], ["建于1820年[1]。", "建于1820年。", "文中说“磨坊建于1830年”[2]。", "文中说「蜜蜂住在磨坊里」[2]。", '文中说"蜜蜂"[2]', "文中说《磨坊》[1]"]),
    (RUSSIAN, ["В 1820 году [1].", "Текст: «Мельница построена» [1].", "Текст: „мельница построена“ [1]."], ["В 1820 году [2].", "Текст: «Мельница сгорела» [1].", "Текст: «ельница построена» [1]."]),
    (CAFE, ["« café » [1]", "«cafe\u0301» [1]", "“n’ouvre qu’à midi” [1]", "\"n'ouvre qu'à midi\" [1]"], ["« cafe » [1]", "« cafés » [1]", "«ouvre à midi» [1]"]),
]  # fmt: skip
