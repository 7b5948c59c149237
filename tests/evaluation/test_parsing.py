"""A large table of replies: what models write, and which option our own rules read in it."""

import string

import pytest

from huatuo_vision.evaluation.parsing import parse_choice
from huatuo_vision.evaluation.self_test import BUILT_IN

OPTIONS = ("Fracture", "Hepatitis C", "E. coli infection", "normal")
FINDINGS = ("Pneumonia", "Pleural effusion", "Pneumothorax", "Lung cancer")
LUNGS = ("left lung", "left lung upper lobe", "right lung", "heart")
SIZES = ("3", "3.5 cm", "35 mm", "-5")
YES_NO = ("Yes", "No")
CHINESE = ("肺炎", "胸腔积液", "气胸", "正常")

# (options, letter or None, question) -> replies
# fmt: off
REPLIES = [
    (OPTIONS, "B", "", [
        "\\boxed{B}", "$\\boxed{\\text{B}}$", "The answer is \\boxed{B}.", "\\(\\boxed{B}\\)",
        "Therefore $\\boxed{\\textbf{(B)}}$", "\\boxed{Hepatitis C}", "\\boxed{\\text{B. Hepatitis C}}",
        '{"answer": "B"}', "{'answer': 'B'}", '```json\n{"answer": "B"}\n```',
        '{"answer": "B", "reason": "not A"}', '{"reasoning": "A is plausible", "final_answer": "B"}',
        '{"answer": "Hepatitis C"}', '{"answer": ["B"]}', '{"choice": "(B)"}', '{"answer": B}',
        "<answer>B</answer>", "<think>A? no, maybe C.</think>B",
        "<think>The answer is A</think>\n\n<answer>B</answer>", "<answer> (B) Hepatitis C </answer>",
        "Option B", "option b", "Option B.", "Option (B)", "Choice B", "B</s>", "B<|eot_id|>",
        "B<|im_end|>\n", "<s> B", "Ｂ", "Ｂ．", "「B」", "【B】", "“B”", "‘B’", "*B*", "__B__", "# B", "- B",
        "> B", "Ⓑ", "B !", "B...", "B;", "B,", "[[B]]", "<B>", "{B}", "((B))", "I choose B", "I choose B.",
        "I would choose option B.", "I would go with (B)", "I'd go with B", "I pick B", "I'd select B",
        "My answer is B", "My choice is B.", "I'm going with B.", "I believe the answer is B",
        "I think the answer is B.", "I think it's B", "It is B.", "It's (B)", "It must be B.", "I think B.",
        "I would say B", "Probably B", "Definitely B.", "So, B.", "So B", "Therefore, B.", "Therefore B",
        "Thus, (B)", "Hence B.", "Thus the answer is B", "Final answer: B", "FINAL ANSWER: B",
        "**Final Answer:** **B**", "Final Answer: (B) Hepatitis C", "The final answer is B.",
        "### Answer\nB", "### Answer: B", "Answer:\n\nB", "Answer - B", "Answer = B", "Answer B",
        "ANSWER: B", "Ans: B", "Ans. B", "Correct answer: B", "Correct option: B", "The correct choice is B",
        "The right answer is B.", "The best answer is B", "The best option is (B).",
        "The best choice would be B", "The most likely answer is B.", "The most appropriate answer is B",
        "The correct answer would be (B).", "The answer should be B.", "The answer to the question is B.",
        "The answer to this question is (B).", "The correct option is therefore B", "The answer is: B",
        "The answer is:\nB", "The answer is option B.", "The answer is letter B.",
        "The correct letter is B.", "The answer is 'B'.", 'The answer is "B".', "The answer is `B`.",
        "The answer, therefore, is B.", "The answer is most likely B.", "The answer is clearly B",
        "the answer is b.", "the answer is (b)", "The answer is B) Hepatitis C",
        "The answer is B - Hepatitis C", "The answer is B, Hepatitis C.", "The answer is B Hepatitis C",
        "B is correct", "B is the correct answer.", "(B) is right.", "Option B is correct.",
        "Option B is the best answer", "B is the answer", "B seems right.", "B is the best choice.",
        "Hepatitis C is the correct answer", "Option (B) is the most likely.", "The answer is not A but B.",
        "The answer is not A; it is B.", "It's not A. It's B.", "Not A, but B", "A is incorrect, so B",
        "A is wrong. B is right.", "A is wrong, so the answer is B.",
        "A, C and D are wrong; the answer is B.", "Rule out A. The answer is B.", "B, not A.", "B (not A)",
        "B rather than A", "The answer is B, not A.", "The answer is B rather than A",
        "Neither A nor C; the answer is B", "Option A is wrong. Option B.",
        "The answer is A. Wait, the answer is B.", "The answer is A. Actually, B.",
        "Initially I thought the answer is A. Final answer: B",
        "At first the answer seems to be A. Therefore, the answer is B.",
        "A closer look at the image shows a lesion. Therefore the answer is B",
        "A fracture would be visible here. So the answer is (B).",
        "Reasoning: the liver is enlarged.\nAnswer: B", "The liver is enlarged.\n\nB",
        "The liver is enlarged.\n\n**B**", "The liver is enlarged. (B)", "The liver is enlarged. B.",
        "The liver is enlarged.\nB. Hepatitis C", "The finding shown is B.",
        "The most likely diagnosis is B.", "The most likely diagnosis is (B) Hepatitis C.",
        "The most likely diagnosis is Hepatitis C.", "Diagnosis: B", "Response: B", "Choice: B",
        "Correct: B", "The correct answer is (B). The other options such as (D) are wrong.",
        "A. Fracture\nB. Hepatitis C\nC. E. coli infection\nD. normal\n\nAnswer: B",
        "(A) Fracture (B) Hepatitis C (C) E. coli infection (D) normal\nThe correct answer is (B).",
        "A. Fracture\nB. Hepatitis C\nC. E. coli infection\nD. normal\n\nB",
        "A. Fracture B. Hepatitis C C. E. coli infection D. normal. The answer is B.", "Hepatitis C.",
        "It is hepatitis C", "The image shows hepatitis C.", "This patient has hepatitis C infection",
        "This is most consistent with Hepatitis C.", "There is no fracture; the liver shows hepatitis C.",
        "The answer is Hepatitis C because the liver is affected", "Answer: Hepatitis C", "'Hepatitis C'",
        "Hepatitis C, not a fracture.", "Hepatitis C rather than E. coli infection", "HEPATITIS C",
        "Hepatitis-C", "Not a fracture. Hepatitis C.", "A hepatitis C infection.", "答案是B", "答案：B",
        "答案: B。", "选B", "选B。", "正确答案为(B)", "正确答案为（B）", "应选择 B", "故选B。", "选项B",
        "B选项", "我选择B", "我认为是B", "我认为答案是B。", "因此选 B", "所以答案是B", "最终答案：B",
        "B是正确的", "B正确", "B 是正确答案", "本题选B", "答案应为B", "正确的选项是B", "答案选B", "应该选B",
        "应选B", "答案为：B", "正确答案是B，因为肝脏异常", "不是A，是B", "A不对，选B", "A错误，所以选B",
        "排除A、C、D，故选B", "答案不是A，而是B", "答案是Ｂ", "答案是选项B", "答案是 **B**", "選B",
        "我会选B", "故本题答案为B。", "根据图像，正确答案是B：Hepatitis C",
        "B\n\nExplanation: option A is not seen.", "B. Hepatitis C\n\nExplanation: The liver...",
        "B because of the liver", "B, because of the liver.", "B. Because of the liver", "B - Hepatitis C",
        "B – Hepatitis C", "B — Hepatitis C", "B.Hepatitis C", "B:Hepatitis C", "B) Hepatitis C",
        "(B)Hepatitis C", "[B] Hepatitis C", "B Hepatitis C", "B. The liver is affected, unlike in A.",
        "Answer: B. Hepatitis C", "Answer: B\nExplanation: A is wrong because ...",
        "B.\n\nThe image shows no fracture.", "Sure! The answer is B.", "Certainly. B",
        "Based on the image, the answer is B.",
        "Based on the image provided, the correct answer is:\n\n**B. Hepatitis C**",
        "The correct answer is:\n\nB. Hepatitis C\n\nExplanation: fracture is not seen.",
        "After reviewing: B", "I am not sure, but the answer is B.",
        "I cannot be certain, but I would choose B.", "Although A is plausible, B is the best answer.",
        "All options were considered. (B)", "Answer: [B]", "Answer: <B>",
        "The answer is **(B)** Hepatitis C.", "answer is B", "Answer is B", "the correct answer is b",
        "ANSWER:B", "Answer:B.", "Selected option: B", "The correct answer among the options is B.",
        "The answer that best fits is B.", "Among the options, B is the best.", "Only B is correct.",
        "My final answer: B", "Answer: The answer is B.", "That leaves B.", "This leaves us with option B.",
        "This corresponds to option B.", "The option that fits is B.",
        "The correct answer is option (B): Hepatitis C.",
        "The correct answer is (B) because the liver (A) is normal.",
        "The answer is B. A fracture would show a line.",
        "B. A is wrong because there is no fracture. C is wrong because there is no culture.",
        "B\nA is incorrect.",
        "Option A: incorrect. Option B: correct. Option C: incorrect. Option D: incorrect.",
        "After careful consideration, I believe that option B is the most appropriate answer.",
        "Looking at the options, (A) is not visible, (C) is not supported, and (D) is false. Therefore (B).",
        "By elimination, A, C, and D are incorrect. The answer must be B.",
        "Since the liver is enlarged, the answer has to be B.", "In conclusion, B.",
        "In conclusion, the answer is B.", "Overall, (B) is the best answer.", "Hence, option B is correct.",
        "Hence the correct option is B.", "Thus, option (B) is the right choice.",
        "Therefore, the correct answer is option B: Hepatitis C.", "The best match is B.",
        "The best description is B.", "B, i.e. hepatitis C", "B (hepatitis C)",
        "B (Hepatitis C) is correct.", "B: Hepatitis C is the most likely diagnosis.",
        "The answer is B, which is Hepatitis C.", "the correct option is b) hepatitis c", "b) hepatitis c",
        "(b) hepatitis c", "b. hepatitis c", "b: hepatitis c", "b", "Assistant: B",
        "ASSISTANT: The answer is B.", "### Response: B", "Response:\nB", "Output: B", "Prediction: B",
        "Label: B", "Choice B is correct", "Letter: B", "Selected: B", "My selection: B",
        "The selected answer is B", "The chosen option is B", "Correct Answer: **(B) Hepatitis C**",
        "**Correct Answer: B**", "**Answer: B. Hepatitis C**", "**B**: Hepatitis C", "**B.** Hepatitis C",
        "**B)** Hepatitis C", "**(B)** Hepatitis C", "*Answer*: B", "Answer: *B*", "__Answer__: B",
        "Answer:B", "Answer:  B  ", "Answer : B", "answer:b", "Answer: (b)", "Answer: [b]", "Answer: b)",
        "Answer: b.", "Answer：Ｂ", "The Answer is (B)", "THE ANSWER IS B", "So the answer is: B",
        "So, the correct answer is (B).", "ANSWER: $B$", "Answer: $\\mathbf{B}$", "$B$", "\\text{B}",
        "\\(B\\)", "The final answer is $\\boxed{B}$. I hope it is correct.", "**Final Answer**\n\\boxed{B}",
        "Final Answer: $\\boxed{\\text{(B) Hepatitis C}}$", "boxed{B}", "\\boxed{ B }", "\\boxed{B.}",
        "\\boxed{b}", "\\fbox{B}", "<final_answer>B</final_answer>", "<option>B</option>",
        "<answer>The answer is B</answer>", "<think>Let me see. A or C?</think><answer>B</answer>",
        "<thinking>Maybe A.</thinking>B", '{"answer":"B","explanation":"The other options (A) are wrong"}',
        '{"Answer": "B. Hepatitis C"}', '{"correct_option": "B"}', '{"option": "B"}', '{"answer": "b"}',
        '[{"answer": "B"}]', '{"result": "B"}', '{"response": "B"}', "answer: 'B'", 'answer = "B"', "(B",
        "B]", '"B', 'B"', "'B'.", '"B."', "[B].", "(B).", "(B):", "(B),", "B?", "B\r\n", "\tB", 'B\u200b',
        '\xa0B\xa0', "B 。", "B。", "B、", "（Ｂ）", "【答案】B", "答案:(B)", "答案是「B」", "答案是“B”",
        "答案：选项B", "正确答案：B", "正确选项：B", "正确选项是B", "答案為B", "應選B", "我的答案是B",
        "最终答案是B", "最终答案为B。", "综上，选B", "综上所述，答案是B。", "因此，正确答案是B。",
        "因此答案为B", "故答案为B", "故选择B", "故选：B", "故选: B.", "选：B", "选择B选项", "选择：B",
        "选择选项B", "应该选择B选项", "本题应选B", "所以选B", "我选B", "我认为选B", "我认为应该选择B",
        "我会选择B", "可能是B", "应该是B", "应为B", "是B", "B。肝炎", "B：丙肝", "B、丙肝", "B是对的",
        "B选项正确", "B项正确", "选项B正确", "选项B是正确的", "选项B是正确答案", "不选A，选B",
        "A不正确，B正确", "A、C、D均错误，故选B", "A、C、D都不对，选B", "答案不是A，是B", "答案应该是B",
        "答案应是B", "答案可能是B", "答案：B（Hepatitis C）", "答案是B。A是错误的。", "答案B", "正确答案B",
    ]),
    (OPTIONS, None, "", [
        "", " ", "\n", ".", "...", "?", "E", "(E)", "The answer is E", "E. Abscess", "Z", "A or B", "A, B",
        "A/B", "A and B", "(A) (B)", "AB", "ABCD", "B\nA", "A. B.", "A; B", "A & B", "(A), (B)", "B or C",
        "Either A or B", "Both A and B", "between A and B", "A. Fracture B. Hepatitis C",
        "a) fracture b) hepatitis c", "The answer is A. The answer is B.", "The answer is A or B",
        "The answer is (A) or (B)", "The answer is either A or B.", "The answer is A and B.",
        "The answer is both B and C", "Final answer: A. Final answer: B.", "\\boxed{A} or \\boxed{B}",
        "\\boxed{E}", '{"answer": "E"}', '{"answer": ""}', '{"answer": ["A", "B"]}', "<answer></answer>",
        "The answer is B: Fracture", "B: Fracture", "B. normal", "B (Fracture)", "fracture or normal",
        "Fracture, hepatitis C", "I", "I think so", "I see a mass.", "Answer: I think it is unclear",
        "I cannot determine the answer from this image.", "I cannot determine the answer.",
        "As an AI, I can't help.", "As an AI language model, I cannot provide a medical diagnosis.",
        "I'm sorry, but I can't assist with that.", "I am unable to determine whether this is a fracture.",
        "It is impossible to tell if there is a fracture.", "The image cannot be interpreted.",
        "I do not know", "I don't know", "No idea", "There is not enough information to say hepatitis C.",
        "Unable to say.", "无法确定", "抱歉，我无法回答这个问题。", "我不知道", "The answer is not B",
        "The answer isn't B", "not B", "B is wrong", "B is incorrect.", "B is not correct",
        "B is not the answer", "rule out B", "B can be ruled out.", "Option B is wrong.", "(B) is incorrect",
        "Not (B)", "I don't think the answer is B.", "I would not choose B", "I'm not sure the answer is B",
        "不是B", "B不对", "答案不是B", "不选B", "排除B", "B错误", "Neither A nor B",
        "The incorrect answer is B", "B is unlikely.", "All except B", "B-mode ultrasound",
        "The answer is B cell lymphoma", "C. difficile", "yes", "none", "unclear", "A mass is visible.",
        "A large lesion.", "The answer is a mass.", "a mass", "I believe a mass is visible",
        "None of the above", "All of the above", "Vitamin B deficiency", "Figure (B) shows a lesion",
        "The structure labelled B shows a mass.", "选A还是B", "答案是A或B", "A和B", "答案：A、B",
        "A is correct and B is correct", "Both A and B are correct.", "Options A and B are correct",
        "No fracture.", "There is no fracture.", "no evidence of hepatitis C", "hepatitis C is ruled out",
        "It is not hepatitis C", "Hepatitis", "Hepatitis C is unlikely.", "We can exclude hepatitis C.",
        "Could be hepatitis C or a fracture.", "A? B?", "The options are A, B, C and D.",
        "Which one is it, A or B?", "B cells are seen", "hmm", "A vs B", "A: B",
        "The answer could be A, but it could also be B.", "The answer is A, B, or C",
        "我无法确定答案是A还是B", "I can't choose between A and B.", "A few lesions", "I. think",
        "A 5 cm mass", "A is the answer. B is the answer.", "The answer is A, B.", "Answers: A and B",
        "The answers are A and C.", "A, C, and D", "A,B,C", "(A) and (B)", "A) and B)",
        "Option A or option B", "Option A, Option B", "A and/or B", "AC", "A+B", "A\n\nB",
        "A. Fracture\nB. Hepatitis C", "A. Fracture\n\nB. Hepatitis C\n\nC. E. coli infection\n\nD. normal",
        "(A) Fracture (B) Hepatitis C (C) E. coli infection (D) normal", "Answer: A\nAnswer: B",
        "\\boxed{A, B}", "\\boxed{AB}", "\\boxed{}", "<answer>A or B</answer>", "I would choose A or B.",
        "I choose A and B", "It could be A or B.", "Maybe A, maybe B.", "The answer is F",
        "The answer is (G).", "Option E", "Option E is correct", "(Z)", "5", "1", "2)", "42", "AAA", "a b",
        "I am not able to view images.", "I'm an AI", "I'm sorry, I cannot help with medical images.",
        "Sorry, I can't answer.", "I cannot provide a diagnosis. Please consult a doctor about hepatitis C.",
        "It is not possible to determine from the image.", "The question cannot be answered.",
        "This cannot be determined without more information about the fracture.",
        "I'd need more information.", "Not sure.", "Unknown", "n/a", "N/A", "None", "none of these",
        "No answer", "Skip", "Both", "Neither", "All", "Please provide the image.",
        "Which option do you mean?", "The correct answer is not listed.", "The answer is none of the above.",
        "The answer is unclear.", "The answer is a difficult one.", "Answer: A lesion in the spleen.",
        "A: I don't know", "Answer: I", "Answer: I am not sure", "The answer is I think unclear",
        "It is a mass", "This is a CT scan.", "An MRI scan", "This is an image", "A 45 year old man",
        "A CT scan shows a mass", "I believe so", "I, personally, am not sure",
        "As a doctor I would say further tests are needed", "Type A", "Group B streptococcus", "Influenza A",
        "Grade B", "A-line", "B lines are visible", "T wave", "Lead I", "stage B", "C-spine", "D-dimer",
        "B12 deficiency", "the B cells", "Not A, not B.", "Neither.", "A is not correct and neither is B.",
        "A and B are wrong", "A, B are incorrect.", "None of A, B, C or D", "Everything but B",
        "The only wrong option is B.", "The least likely answer is B", "I would rule out option B",
        "Option B can be excluded", "We can eliminate B", "B can't be right", "B isn't right",
        "B cannot be correct.", "B seems wrong", "It's not B", "It isn't B", "That's not B",
        "definitely not B", "Certainly not B", "I doubt it is B", "If the answer is B, treat.",
        "Is the answer B?", "Could it be B?", "既不是A也不是B", "不是A也不是B", "A和B都不对", "A、B", "A或B",
        "答案不确定", "答案是E", "选E", "选择哪个？", "可能是A或B", "可能是A也可能是B", "答案是A还是B？",
        "不能选B", "不应选B", "B是错误的", "B项错误", "选项B错误", "选项B不正确", "B被排除", "非B",
    ]),
    (FINDINGS, "A", "", [
        "pneumonia", "The chest X-ray shows pneumonia.", "Pneumonia is seen, no pleural effusion.",
        "There is no pneumothorax, but pneumonia is present.",
        "No effusion is seen. Consistent with pneumonia.", "There is no doubt this is pneumonia.",
        "It is pneumonia rather than lung cancer.", "Lung cancer is unlikely; pneumonia is more likely.",
        "The findings are not consistent with lung cancer. They are consistent with pneumonia.",
        "Pleural effusion and pneumothorax can be excluded. The diagnosis is pneumonia.",
        "It could be lung cancer or pneumonia. Overall, the diagnosis is most likely pneumonia.",
        "A pneumonia", "the pneumonia", "Pneumonia (A)", "Pneumonia, option A",
        "(A) Pneumonia is the best answer, not B.", "Lung cancer can be ruled out, leaving pneumonia.",
        "Findings are suggestive of pneumonia.", "Pneumonia.", "**Pneumonia**",
        "The patient most likely has pneumonia", "Right-sided pneumonia", "I think this is pneumonia.",
        "The diagnosis is pneumonia, not lung cancer.", "pneumonia; no pneumothorax",
        "No pneumothorax; pneumonia.", "Without effusion; it is pneumonia",
        "The X-ray does not show a pneumothorax but shows pneumonia.",
        "There isn't any pleural effusion. There is pneumonia.", "Answer: pneumonia",
        "The answer is pneumonia (A).", "The correct answer is pneumonia.",
        "Pneumonia is the correct answer.",
        "The correct answer is Pneumonia, as there is consolidation and no pleural effusion.",
        "Unlike lung cancer, pneumonia shows consolidation.", "The answer is Pneumonia and not Lung cancer.",
        "It's pneumonia instead of lung cancer.", "Pneumonia, since there's no pneumothorax",
    ]),
    (FINDINGS, None, "", [
        "There is no evidence of pneumonia.", "no pneumonia",
        "No pneumonia, pleural effusion or pneumothorax is seen.", "Pneumonia is not seen.",
        "Pneumonia has been ruled out.", "The lungs are clear without pneumonia",
        "Cannot rule out pneumonia", "absence of pneumonia", "negative for pneumonia",
        "It is not consistent with pneumonia.", "pneumonia or lung cancer",
        "I cannot determine whether this is pneumonia.", "less likely pneumonia",
        "The scan doesn't show pneumonia", "pneumonia. pleural effusion.", "Pneumonia (B)", "B. Pneumonia",
        "neither pneumonia nor lung cancer", "Pneumonia? No.", "not pneumonia", "Pneumonia is excluded",
        "no signs of pneumonia or pneumothorax", "It is unlikely to be pneumonia",
        "pneumonia cannot be seen", "The lungs are free of pneumonia", "The absence of pneumonia is notable",
        "I can't tell if it's pneumonia", "pneumonia and pleural effusion are seen", "other than pneumonia",
        "Nothing suggests pneumonia",
    ]),
    (LUNGS, "B", "", [
        "left lung upper lobe", "It is in the left lung upper lobe.", "B: left lung upper lobe",
        "The left lung upper lobe", "B. Left lung, upper lobe", "The answer is left lung upper lobe.",
        "left lung upper lobe, not the right lung",
    ]),
    (LUNGS, "A", "", [
        "left lung", "It is in the left lung.", "A: left lung", "A. left lung",
    ]),
    (LUNGS, None, "", [
        "B: left lung", "lung", "left lung and right lung", "not the left lung",
    ]),
    (SIZES, "A", "", [
        "3", "A", "3.", "The answer is 3", "It is 3",
    ]),
    (SIZES, "B", "", [
        "3.5 cm", "3.5cm", "about 3.5 cm", "The size is 3.5 cm.", "B. 3.5 cm",
    ]),
    (SIZES, "C", "", [
        "35 mm", "35mm",
    ]),
    (SIZES, "D", "", [
        "-5", "−5", "D: -5",
    ]),
    (SIZES, None, "", [
        "3.5", "35", "5", "30", "3 or 3.5 cm", "350 mm",
    ]),
    (YES_NO, "A", "", [
        "Yes", "yes.", "YES", "Yes, there is a mass and no other finding.", "yes it is", "A", "A. Yes",
        "(A) Yes", "The answer is yes.", "Yes. The lung is abnormal.", "no other finding; yes", "**Yes**",
        "Yes!", "I believe yes", "Answer: Yes", "Yes, no fracture is seen elsewhere",
        "Yes, there is no doubt", "The correct answer is A", "Yes</s>", "\\boxed{Yes}", '{"answer": "yes"}',
        "Yes, it does.", "Yes it does not change", "yes,", "Yes;", "yes - a mass", "Yes: there is", "(Yes)",
        "Yes, the image shows no abnormality?", "The answer is Yes", "Yes, because", "Of course, yes.",
        "yes. A mass is seen.", "Yes\n\nNo other lesions.", "YES, definitely.", "Option A: Yes",
        "A: Yes, there is.", "The image shows Yes.", "yes",
    ]),
    (YES_NO, "B", "", [
        "No", "no.", "No, there is no fracture.", "No, it is not.", "No there is not", "B", "B. No",
        "The answer is no.", "Answer: no", "no\n", "No - the lung is clear",
        "No, I cannot see any fracture.", "no, not a fracture. The lung is clear", "The image shows No.",
        "No, nothing.", "No.", "NO!", "No, the", "No; the lungs are clear", "(No)", "No\n",
        "The answer is No", "Answer is no", "B) No", "B. No, there isn't.", "Final answer: No",
        "no because the lungs are clear", "No, there is no evidence of pneumonia.",
        "The correct answer is (B) No.", "I would say no.", "Therefore, no.", "It is not visible, so no.",
    ]),
    (YES_NO, None, "", [
        "none", "normal", "I do not know", "unknown", "There is no evidence of X", "nodule", "not sure",
        "Yes and no", "yes or no", "Yes/No", "no other finding", "The lung is normal", "", "maybe",
        "I cannot answer yes or no questions.", "hmm", "A. No", "B: Yes", "Nothing", "Yes. No.",
        "There is no pneumothorax", "it is noted", "No idea", "No comment", "no yes", "not", "Possibly",
        "unclear", "I can't tell, yes or no", "I don't know if yes", "none seen", "now", "notable",
        "no one knows", "yesterday", "The lungs are clear", "No findings", "abnormal",
        "I cannot determine the answer",
    ]),
    (YES_NO, "B", "Is there a fracture?", [
        "There is no fracture.", "No fracture is seen.", "No evidence of fracture.",
    ]),
    (YES_NO, "A", "Is there a fracture?", [
        "There is a fracture.",
    ]),
    (YES_NO, None, "Is there a fracture?", [
        "There is no pneumothorax.", "The lungs are clear.",
    ]),
    (CHINESE, "A", "", [
        "肺炎", "这是肺炎。", "图像显示肺炎", "答案是肺炎", "A. 肺炎", "A：肺炎", "没有气胸，有肺炎",
        "不是气胸，是肺炎", "选A", "答案：A. 肺炎", "考虑肺炎", "正确答案是A：肺炎",
        "气胸可以排除，考虑肺炎",
    ]),
    (CHINESE, None, "", [
        "没有肺炎", "未见肺炎", "不是肺炎", "肺炎或气胸", "排除肺炎", "A. 气胸", "无法判断是否为肺炎",
    ]),
    (("是", "否"), "A", "", ["是", "是的", "是的，有肺炎", "A", "答案是A", "答案：是"]),
    (("是", "否"), "B", "", ["否", "不是", "没有", "B。否"]),
    (("Yes", "yes", "no"), None, "", ["yes"]),
    (("Yes", "yes", "no"), "B", "", ["B. yes"]),
    (("B", "A"), "B", "", ["B"]),
    ((".5", "5"), "B", "", ["5"]),
    (("5", "-5"), "B", "", ["-5"]),
    (("Normal", "Abnormal"), "B", "", ["Abnormal", "abnormal finding", "B: abnormal"]),
    (("Benign", "Malignant", "Not malignant"), "C", "", ["not malignant", "It is not malignant."]),
    (("Fracture", "No fracture"), "B", "", ["No fracture", "There is no fracture", "no fracture is seen"]),
    (("Fracture", "No fracture"), "A", "", ["There is a fracture"]),
    (("Vitamin A", "Vitamin B", "Vitamin C"), "B", "", [
        "Vitamin B", "vitamin b", "It is vitamin B deficiency", "B. Vitamin B", "The answer is vitamin B."
    ]),
    (("A positive", "B positive", "AB positive", "O positive"), "C", "", [
        "AB positive", "The blood group is AB positive."
    ]),
    (("A positive", "B positive", "AB positive", "O positive"), "A", "", ["A positive", "The answer is A positive."]),
    (("A positive", "B positive", "AB positive", "O positive"), None, "", ["It's positive"]),
    (("ER+", "ER-"), "B", "", ["ER-", "The tumor is ER-."]),
    (("ER+", "ER-"), "A", "", ["ER+"]),
    (("<5 mm", "5 mm", ">5 mm"), "A", "", ["<5 mm", "It is <5 mm."]),
    (("<5 mm", "5 mm", ">5 mm"), "C", "", ["> 5 mm"]),
    (("left", "right", "both"), "A", "", [
        "left", "The right answer is left.", "The left side", "The answer is left, not right."
    ]),
    (("None of the above", "All of the above", "CT"), "A", "", [
        "None of the above", "None of the above.", "The answer is none of the above"
    ]),
    (("Cannot be determined", "A mass"), "A", "", [
        "Cannot be determined", "It cannot be determined", "The age cannot be determined."
    ]),
    (("Cannot be determined", "A mass"), "B", "", ["a mass", "mass", "There is a mass"]),
    (("A: heart", "B: lung", "C: liver"), "B", "", ["lung", "B: lung", "B", "It shows the lung."]),
    (OPTIONS, None, "", ["Answer: C. difficile colitis", "Would you choose B?", "Should one go with B?"]),
    (("Fracture", "No fracture"), None, "", ["No fracture or fracture"]),
    (("<image 1>", "<image 2>"), "B", "", ["<image 2>", "B. <image 2>", "The answer is <image 2>"]),
    # What a reply says beside its choice: tables, verdicts on every option, marks, second thoughts.
    (FINDINGS, "B", "", [
        "| Answer |\n|---|\n| B |", "| Question | Answer |\n|---|---|\n| 1 | B |",
        "| Option | Verdict |\n|---|---|\n| A | no |\n| B | yes |\n\nAnswer: B",
        "| Option | Verdict |\n|:--|:-:|\n| A | wrong |\n| B | correct |\n| C | wrong |\n| D | wrong |",
        "| A | Pneumonia | ✗ |\n| B | Pleural effusion | ✓ |\n| C | Pneumothorax | ✗ |",
        "A ❌\nB ✅\nC ❌\nD ❌", "A) Pneumonia ✗\nB) Pleural effusion ✓\nC) Pneumothorax ✗\nD) Lung cancer ✗",
        "A: no. B: yes. C: no. D: no.",
        "B\n\nA) Pneumonia: would show consolidation.\nC) Pneumothorax: would show air.",
        '{"answer": {"letter": "B", "text": "Pleural effusion"}}', "[ANSWER] B [/ANSWER]",
        "\\boxed{A} is wrong. Final answer: \\boxed{B}", "B<|endoftext|>Human: What about A?", "B</s> A",
        "neither A nor C but B", "Not C. B.", "Neither C nor D; B.", "I choose B over A.", "I prefer B to A.",
        "It's either A or B. I choose B.", "Between A and B, B is better.", "B is more likely than A.",
        "Only B fits.", "Everything except B is wrong.", "All options other than B are incorrect.",
        "Unlike A, B fits the picture.", "The answer is B (A is wrong)", "Final answer: B (not A)", "B, A is wrong.",
        "I was going to say A, but it is B.", "My answer is B. If the angle were sharp, A would be the answer.",
        "I reject A in favor of B.", "Most likely B", "maybe B", "Possibly B", "It looks like B.",
        "正确答案是B，A是错误的", "A错B对", "A不符合，B符合", "A不对，B才对", "不是A而是B", "选B不选A", "B（不是A）",
        "La respuesta correcta es B", "La réponse est B.", "Die Antwort ist B.", "答えはBです。", "정답은 B입니다.",
    ]),
    (FINDINGS, None, "", [
        "Maybe B, maybe C", "Some say B.", "No reason to choose B.", "Possible answers: B; C", "B... no.", "B: no.",
        "B ✗", "B would be the answer if the mass were solid.", "The answer is B. Actually no, that is wrong.",
        "A. M. is a 45-year-old man", "B is the least likely.", "I would avoid B.",
    ]),
    (("Left", "Right", "Both", "Neither"), None, "", ["Neither A nor B.", "Both A and B are possible"]),
    (("Left", "Right", "Both", "Neither"), "C", "", ["Both", "Both sides are affected.", "Both lungs"]),
    (LUNGS, None, "", ["upper lobe of the left lung"]),
    (("3 cm", "3.5 cm", "35 mm", "5 cm"), "B", "", ["3.50 cm", "3.5 centimeters", "It measures 3.5 centimetres."]),
    (("1", "2", "3", "4"), "C", "", ["three", "There are three lesions.", "3"]),
    (("1", "2", "3", "4"), "A", "", ["one", "One."]),
    (("Two vessels", "Three vessels"), "B", "", ["3 vessels", "three vessels"]),
    (YES_NO, "A", "", ["Yeah", "Yep, there is.", "True", '{"answer": true}', "对", "存在"]),
    (YES_NO, "B", "", ["Nope", "Nope, nothing.", "False", '{"answer": false}', "不", "无", "不存在"]),
]
# fmt: on

CASES = [(reply, options, question, letter) for options, letter, question, replies in REPLIES for reply in replies]


@pytest.mark.parametrize(("reply", "options", "question", "letter"), CASES)
def test_what_a_reply_chooses(reply, options, question, letter):
    assert parse_choice(reply, options, question) == letter


def test_no_reply_stands_in_the_table_twice():
    assert len({case[:3] for case in CASES}) == len(CASES) > 900


CHOICE_ROWS = [row for row in BUILT_IN if row["options"]]
# {0} and {1} are letters of two options.
CONTRADICTING = (
    "{0} or {1}", "{0}, {1}", "({0}) and ({1})", "{0}\n{1}", "The answer is {0} or {1}.",
    "The answer is {0}. The answer is {1}.", "Answer: {0}\nAnswer: {1}", "Final answer: {0}. Final answer: {1}.",
    "\\boxed{{{0}}} \\boxed{{{1}}}", '{{"answer": ["{0}", "{1}"]}}', "Option {0} and option {1}", "答案是{0}或{1}",
    "{0} is correct. {1} is correct.", "I would choose {0} or {1}.",
)  # fmt: skip
REJECTING = (
    "not {0}", "The answer is not {0}.", "{0} is wrong.", "({0}) is incorrect.", "Rule out {0}.", "不是{0}", "排除{0}",
    "I don't think the answer is {0}.", "{0} can be excluded.", "{0} is not the correct answer.",
)  # fmt: skip


@pytest.mark.parametrize("form", [*CONTRADICTING, *REJECTING])
def test_two_letters_and_rejected_letters_choose_nothing_whatever_the_options(form):
    for row in CHOICE_ROWS:
        letters = string.ascii_uppercase[: len(row["options"])]
        other = letters[(letters.index(row["answer"]) + 1) % len(letters)]
        assert parse_choice(form.format(row["answer"], other), row["options"]) is None, row["options"]


@pytest.mark.parametrize(
    "filler", ["word ", "(", "answer ", "the answer is ", "so ", "option B ", "<answer>", ". ", "1,"]
)
def test_a_reply_that_repeats_itself_ends(filler):
    """Models loop; a reply of thousands of signs must not hold up a run."""
    assert parse_choice((filler * 4000)[:6000] + ". Final answer: C", OPTIONS) in ("C", None)
