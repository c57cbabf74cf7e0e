"""(check, answers that pass, answers that fail)"""


def choice(answer: str, *labels: str) -> dict:
    return {"type": "choice", "labels": list(labels), "answer": answer}


TABLE = [
    (choice("not spam", "spam", "not spam"), ["not spam", "Not spam.", "**not spam**", "It is not  spam", "not_spam", "Label: not-spam", "NOT SPAM"], ["spam", "spam, not spam", "spam or not spam", "", "Is it not spam?", "not not spam", "unknown"]),
    (choice("spam", "spam", "ham"), ["spam", "Spam!", "{\"label\": \"spam\"}", "`spam`", "_spam_", "This is spam.", "not ham but spam", "Is it ham? No: spam", "ＳＰＡＭ", "ham is wrong. spam", "<think>ham, ham</think>spam"], [
        "not spam", "It isn't spam", "It is not a spam", "I don't think it is spam", "no spam", "non-spam", "anti-spam?", "spam?", "Is it spam? No.", "ham", "ham, spam", "spam or ham", "neither spam nor ham", "spam is wrong",
        "kein Spam", "это не spam", "pas spam", "spam değil", "rather than spam", "anything but spam", "hardly spam", "spammer", "<think>spam", "<think>spam</think>ham", "The answer is spam or ham", "no es spam", "não é spam"]),
    (choice("C++", "C", "C++", "C#"), ["C++", "C++.", "I'd use C++", "It is C++!", "(C++)", "**C++**"], ["C", "C#", "C, C++", "C+", "C/C++", "not C++"]),
    (choice("C", "C", "C++", "C#"), ["C", "C.", "It is C", "C言語です", "plain C, not C++"], ["C++", "C#", "c'est la vie", "Vitamin-C-rich", "CC"]),
    (choice("(A)", "(A)", "(B)"), ["(A)", "（A）", "The answer is (A).", "(a)"], ["(B)", "(A) (B)", "(A) or (B)", "A"]),
    (choice("B", "A", "B", "C"), [
        "B", "b", "(B)", "B)", "b)", "b.", "B: Paris", "**B**", "The answer is B, a mammal.", "A whale is a mammal, so B", "It is B.", "Option B", "option b.", "答案是B", "答案：B。", "答えはBです", "정답은 B입니다", "Ответ: B", "Respuesta: B",
        "\\boxed{B}", "\\boxed{\\text{B}}", "A is a fish, C is a bird. The answer is B.", "[B]", "“B”", "Not A. B", "B because it barks", "A is wrong, B is right", "<answer>B</answer>", "<think>\nIt could be A or B, 3 of them... {\"x\": 1}, no.\n</think>\n\nB", "Ｂ", "（B）", "B\n\nA dog barks."], [
        "A", "C", "A, B", "A or B", "A/B", "A, B, C", "not B", "B is wrong", "neither B nor C", "It can't be B", "The answer is A or B", "The answer is B. No, the answer is C.", "The answer is A. Not B.", "B-movie", "Bee", "AB", "", "x", "B?", "Either B or C",
        "答案不是B", "B ist falsch", "\\boxed{A} B", "I think a", "a b c"]),
    (choice("A", "A", "B", "C"), ["A", "a", "A is right", "It is A because it swims", "(a) fish", "Answer: A"], ["A whale lives there.", "It is a whale", "B, a mammal", "a whale", "A and B"]),
    (choice("是", "是", "否"), ["是", "是。", "答案是：是。", "是的", "是，这是垃圾邮件"], ["否", "不是", "是否", "这是什么", "是或否：否", "答案是：否。", "是还是不是"]),
    (choice("正面", "正面", "负面", "中性"), ["正面", "这条评论是正面的", "情感：正面", "「正面」", "正面です", "不是负面，是正面"], ["负面", "不是正面", "不是正面的", "正面ではない", "正面和负面", "非正面", "并不正面", "正面？", "没有正面"]),
    (choice("はい", "はい", "いいえ"), ["はい", "はい、そうです。", "「はい」", "はいです"], ["いいえ", "ではいけない", "はい？", "はいではありません", "はい、いいえ"]),
    (choice("긍정", "긍정", "부정"), ["긍정", "긍정입니다", "정답은 긍정이다", "정답: 긍정"], ["부정", "긍정이 아닙니다", "긍정, 부정", "긍정?", "무긍정"]),
    (choice("हाँ", "हाँ", "नहीं"), ["हाँ", "हाँ।", "उत्तर: हाँ"], ["नहीं", "हा", "हाँ नहीं", "हाँ?"]),
    (choice("نعم", "نعم", "لا"), ["نعم", "نعم.", "الجواب: نعم"], ["لا", "نعم ولا، لا", "ليس نعم", "نعم؟"]),
    (choice("very positive", "positive", "very positive", "negative"), ["very positive", "Very  Positive", "It's very positive!", "very-positive"], ["positive", "very negative", "not very positive", "positive, very positive"]),
    (choice("B", "A", "B", "C", "D"), ["Answer: B\n\nThis answer is right because it barks.", "B. The answer is clear.", "The correct option is B. The answer is the one that barks.", "Answer: B. The answer is not A.", "B\n\n\\boxed{\\text{Lyon}}"], [
        "At first B seems right. But the answer is not B.", "B seems right. The answer is none of them.", "It was B. \\boxed{E}", "I thought of B. The answer is Lyon.", "It could be B; the answer is unclear"]),
    (choice("I", *"ABCDEFGHI"), ["I", "The answer is I.", "Option I", "(I)", "\\boxed{I}", "So it is option I"], ["Since no option fits, I can only guess.", "I think", "The answer I gave", "The answer is B. I would go with that."]),
    (choice("1", "1", "2"), ["1", "1.", "Rating: 1", "1/5"], ["1.5", "-1", "2.1", "1,5", "2"]),
    (choice("no", "yes", "no"), ["no, I have no doubt", "The answer is no."], ["I have no idea.", "There is no answer.", "no idea"]),
    (choice("café", "café", "bar"), ["cafe\u0301", "Café", "un café"], ["cafe", "bar", "cafés", "pas un café"]),
    (choice("yes", "yes", "no"), ["yes", "Yes.", "Yes, it is", "**Yes**"], ["no", "No.", "yes and no", "yes?", "not yes", "yesterday", "no, not yes"]),
    (choice("no", "yes", "no"), ["no", "No.", "No, it is not.", "no!"], ["yes", "yes or no", "none", "know", "not no"]),
    (choice("non-toxic", "toxic", "non-toxic"), ["non-toxic", "Non-toxic.", "non toxic"], ["toxic", "not toxic, non-toxic? toxic", "nontoxic-ish"]),
    (choice("положительный", "положительный", "отрицательный"), ["положительный", "Ответ: Положительный.", "Отзыв положительный"], ["отрицательный", "не положительный", "положительный или отрицательный", "положительный?"]),
]  # fmt: skip
