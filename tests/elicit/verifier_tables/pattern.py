"""(check, answers that pass, answers that fail)"""


def pattern(text: str, **more) -> dict:
    return {"type": "pattern", "pattern": text, **more}


TABLE = [
    (pattern(r"(?<!\d)\d{5}(?!\d)"), ["12345", "in 12345 Town", "**12345**", "`12345`", "PLZ: 12345.", "邮编是12345。", "郵便番号は１２３４５です", "الرمز ١٢٣٤٥", "कोड १२३४५ है", "Индекс: 12345", "<think>1234?</think>\n\n12345", "```\n12345\n```", "1234, no: 12345", "$12345$"], [
        "", "1234", "123456", "12 345", "1234 5", "twelve", "一二三四五", "<think>12345</think>1234", "<think>12345", "1234\n5", "12.345"]),
    (pattern(r"\d{5}", whole=True), ["12345", " 12345 ", "\n12345\n", "<think>It is 5 digits.</think>\n\n12345", "１２３４５"], ["in 12345", "12345.", "**12345**", "`12345`", "12345\n\nHope this helps!", "123456", "```\n12345\n```", "答案是12345", "1234", "12345 12345"]),
    (pattern(r"(?i)\bcafé\b"), ["un café", "cafe\u0301", "CAFÉ", "CAFE\u0301 noir", "**café**", "«café»", "café。"], ["cafe", "cafés", "décafé", "caf", "<think>café</think>thé"]),
    (pattern(r"(?m)^Answer: [A-D]$"), ["Answer: B", "It barks.\n\nAnswer: B", "Answer: B\nBecause it barks.", "It barks.\r\nAnswer: B\r\nSo."], ["answer: B", "Answer: E", "The Answer: B", "Answer: B.", "**Answer: B**", "Answer:B", "Answer: B, C"]),
    (pattern(r"^(是|否)[。.]?$"), ["是", "否。", "<think>是不是？</think>是。", " 是 "], ["不是", "是的", "是，对", "是否", "「是」"]),
    (pattern(r"^\p{Cyrillic}[\p{Cyrillic} ,.-]*$"), ["Москва", "Да, Москва.", "Ё"], ["Moscow", "Москва 1", "**Москва**"]),
    (pattern(r"\\boxed\{(-?\d+)\}"), ["\\boxed{12}", "So $\\boxed{-3}$.", "$$\\boxed{12}$$\nDone."], ["boxed{12}", "\\boxed{x}", "\\boxed {12}", "\\boxed{1.5}"]),
    (pattern(r"(?s)^```sql\n.*SELECT.*\n```$"), ["```sql\nSELECT 1;\n```", "<think>join?</think>```sql\nWITH a AS (\n  SELECT 1)\nSELECT * FROM a;\n```\n"], ["SELECT 1;", "Here:\n```sql\nSELECT 1;\n```", "```\nSELECT 1;\n```", "```sql\nSELECT 1;\n```\nDone."]),
    (pattern(r"ngày|นี้|اليوم|आज|오늘"), ["hôm nay là ngày 3", "hôm nay là nga\u0300y 3", "วันนี้", "اليوم", "आज", "오늘은", "오늘"], ["ngay", "today", "오 늘", "वह"]),
]  # fmt: skip
