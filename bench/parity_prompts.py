"""Twenty-four prompts for bench/parity.py: plain English, some code, from four words to several hundred tokens."""

_STORY = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the fishing boat appeared. It came out of the "
    "fog with its lamps unlit, drifting sideways, and for a long moment he thought that nobody was aboard. Then a "
    "figure stood up in the stern and waved both arms. He ran down the two hundred and twelve steps, pulled the "
    "dinghy from under its cover, and rowed out through the cold grey water. "
)
_REPORT = (
    "In the third quarter the company sold 4,120 bicycles, 310 more than in the quarter before. Most of them were city "
    "bicycles; electric ones made up a third of the sales and more than half of the revenue. Costs rose by six per "
    "cent, mainly because of freight and aluminium. The board expects a quiet winter and plans to open two shops in "
    "spring. "
)

PROMPTS = [
    "What is the capital of France?",
    "The quick brown fox jumps over",
    "Explain in two sentences why the sky is blue.",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "Write a short poem about the sea in winter.",
    "def fibonacci(n):\n    ",
    "List five things to pack for a weekend of hiking, and say why each of them matters.",
    "Water boils at 100 degrees Celsius at sea level, but on a high mountain",
    "Who wrote the play Hamlet, and what is it about?",
    "Dear Ms. Novak,\n\nThank you for your letter of 3 March. We are sorry to hear that",
    "Translate into French: Where is the nearest railway station?",
    "1, 1, 2, 3, 5, 8, 13,",
    "Give me a recipe for tomato soup for four people.",
    "import json\n\n\ndef read_config(path):\n    with open(path) as file:\n",
    "What is the difference between weather and climate? Answer as you would for a child of ten.",
    "Q: A train leaves at 9:40 and arrives at 12:05. How long does the journey take?\nA:",
    f"Summarize this text in one sentence.\n\n{_REPORT}",
    _STORY,
    "Name three advantages and three disadvantages of living in a big city.",
    f"{_STORY}\nThe figure in the boat turned out to be",
    f"Here are two texts.\n\n{_STORY}\n\n{_REPORT}\n\nWhich of the two is fiction, and how can one tell?",
    f"{_REPORT * 3}In short,",
    f"Continue this story in the same style.\n\n{_STORY * 4}",
    "I have two apples, I buy three more and then give one away. How many apples do I have?",
]
