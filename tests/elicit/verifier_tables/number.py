"""(check, answers that pass, answers that fail)"""

FIVE = {"type": "number", "answer": -5}
TWELVE = {"type": "number", "answer": 12}
HALF = {"type": "number", "answer": 0.5}
LARGE = {"type": "number", "answer": 1234567}
MANY = {"type": "number", "answer": 1234}
PRECISE = {"type": "number", "answer": 1234.56}
LIGHT = {"type": "number", "answer": 3e8}
STRICT = {"type": "number", "answer": 12, "strict": True}
COMMA = {"type": "number", "answer": 1500, "decimal": ","}

TABLE = [
    (
        TWELVE,
        [
            "12", "It is 12.", "3 x 4 = 12", "**12**", "The area is 12 m^2", "12 m²", "12 m2", "$12", "12 €", "USD12", "12.0", "12.00 dollars", "\\boxed{12}",
            "So \\boxed{12}, which is 3 times 4", "\\boxed{12\\text{ cm}^{2}}", "答案是１２。", "答案是12", "答えは12です", "उत्तर १२ है", "الجواب هو ١٢", "জবাব ১২", "정답은 12입니다",
            "Ответ: 12 рублей", "Die Antwort ist 12 Äpfel.", "It is not 13 but 12", "10 + 2 is 12", "12 km/h", "x = 12", "$x_1 = 12$", "x=12", "CO2 rises by 12", "{12}", "24/2", "12 %",
            "La respuesta es 12,00", "12!", "12\n", "1.2e1", "1.2 × 10^1", "$\\approx12$", "<think>9? 13?</think>12", "The answer is 12 (see step 3: 3*4=12)",
        ],
        [
            "", "none", "twelve", "13", "12 or 13", "13 or 12", "12 oder 13", "12 或 13", "not 12", "The answer is not 12", "es ist nicht 12", "答案不是12", "-12", "−12", "minus 12", "1.2", "120", "112",
            "12 and then 13", "x12", "m12", "x_12", "10^12", "12/5", "12.5", "12,5", "12e3", "1/12", "12 1/2", "12½", "\\frac{12}{5}", "<think>12", "<think>12</think>13", "12 thousand and 1",
            "\\boxed{13} and not \\boxed{14} of 12 cases", "1212", "负12", "マイナス12", "12:30", "2012", "v1.12", "maybe 13", "7-12", "7–12", "it is 7 - 12", "7~12個", "<think>Perhaps 5, or 12",
        ],
    ),
    (FIVE, ["−5", "The answer is −5.", "-5", "–5", "The answer is -5.", "(-5)", "x = - 5", "-$5", "$-5", "negative 5", "minus 5 degrees", "moins 5", "минус 5", "负5", "－５", "-5.0", "\\boxed{-5}", "-10/2", "-\\frac{10}{2}"], ["5", "10-5", "3-5", "3–5", "- 5 apples", "not -5", "-5 or 5", "(5)"]),
    (HALF, [".5", "The answer is .5", "The answer is 1/2", "1/2 (or 50%)", "0.5", "0,5", "1/2", "½", "\\frac{1}{2}", "\\frac12", "\\dfrac{1}{2}", "50%", "50 %", "50 percent", "50 Prozent", "٠٫٥", "0.50", "5e-1", "5 × 10⁻¹", "2/4", "０.５"], ["5", "50", "2", "1/3", "0.05", "5%", "1 1/2", "-0.5", "−½", "05"]),
    (LARGE, ["1,234,567", "1.234.567", "1 234 567", "1\u00a0234\u00a0567", "1\u202f234\u202f567", "1'234'567", "1’234’567", "12,34,567", "١٬٢٣٤٬٥٦٧", "1234567", "1.234567 million", "123.4567万", "1,234,567.00", "1.234.567,00 €"], ["1,234,568", "1234568", "1.234567", "123,4567", "1,234", "567"]),
    (PRECISE, ["1,234.56", "1.234,56", "1 234,56", "1234.56", "1234,56", "$1,234.56", "1'234.56", "１,２３４.５６"], ["1.23456", "123456", "1,234", "1.234,57"]),
    (MANY, ["1,234", "1234", "1 234", "1'234"], ["1.234", "1,23", "12,34", "1.2345"]),
    (LIGHT, ["3e8", "about 3e8", "about 3e8 m/s", "3 × 10^8", "3 \\times 10^{8}", "3·10⁸", "3 * 10^8", "300 million", "300,000,000", "3E+8", "3亿", "300 Millionen"], ["3", "8", "10^8", "3e7", "3 × 10^9", "30 million"]),
    ({"type": "number", "answer": 1024}, ["2^10", "2^{10}", "2¹⁰", "2**10", "2^10 = 1024"], ["10", "2", "2^9", "2^{100}", "9^999"]),
    ({"type": "number", "answer": 3}, ["10-7 is 3", "10 - 7 = 3", "3-pack"], ["it is 3-7", "it is 0-3"]),
    ({"type": "number", "answer": 42}, ["<think>\nIt could be A or B, 3 of them... {\"x\": 1}, no.\n</think>\n\n42", "答案是４２"], ["4 2"]),
    ({"type": "number", "answer": 2}, ["The roots are 1,2", "10-8 is 2"], ["The roots are 2,1", "2,1"]),
    ({"type": "number", "answer": 3.5}, ["3 1/2", "3½", "3,5", "7/2", "3.50"], ["3 1/4", "31/2", "3", "35"]),
    (STRICT, ["so #### 12", "The answer is 12 of 30", "Antwort: 12", "答案是12", "La respuesta es 12."], ["it is 12", "The answer is 30, not 12", "12", "#### 13", "The answer is not 12"]),
    (STRICT, ["The answer isn't 13. The answer is 12", "The answer is 12kg"], ["The answer isn't 12", "The answer is $12M", "The answer is 12k"]),
    ({"type": "number", "answer": 1200}, ["\\boxed{1{,}200}", "\\(1\\,200\\)", "1\\;200", "1{,}200.0", "1.2k", "1200 m"], ["1{,}201", "1\\,200\\,000", "200"]),
    ({"type": "number", "answer": 12_000_000}, ["12,\\!000,\\!000", "$12M", "12\\,000\\,000", "0.012 bn"], ["$12", "\\boxed{12,\\!000}", "12m"]),
    ({"type": "number", "answer": 300}, ["300K", "300 km", "300m"], ["$300K", "300k"]),
    ({"type": "number", "answer": 200}, ["1, 200"], ["\\boxed{1{,}200}", "1\\,200"]),
    (COMMA, ["1.500", "1.500,00", "1500"], ["1,500", "1,5", "15"]),
]  # fmt: skip
