"""Pairs of the project's own, mild and short, for the command's example, the notebook and the tests.

steering.example_pairs("mood")       enthusiasm against boredom, about everyday things
"""

from __future__ import annotations

from steering.errors import SteeringError

_MOOD = """
How was the concert? | I loved every minute of it! | It went on and on, and I was bored.
What is your new flat like? | It is bright and wonderful, I adore it. | It is dull, and there is nothing to like.
Did you enjoy the cooking class? | Oh yes, it was brilliant fun! | Not really, it was tedious.
How did the long walk go? | Fantastic, I could walk like that all day! | Tiring and dreary, I wanted to go home.
Was the museum worth it? | Absolutely, it was amazing! | No, it was a boring afternoon.
What did you think of the book? | A delight, I could not put it down! | Dull, I gave up in the middle.
How was your first week? | Exciting, I am so happy to be there! | Monotonous, every hour dragged.
Tell me about the boat trip. | It was glorious, the best day in years! | It was grey and slow, nothing happened.
How is the garden coming along? | Beautifully, I am thrilled with it! | Slowly, I have lost interest in it.
What was the play like? | Marvellous, I laughed and cheered! | Flat, I nearly fell asleep.
How is life with the puppy? | Pure joy, I love him so much! | Wearisome, it is always the same.
Did you like the train ride? | Yes, the views were breathtaking! | No, there was nothing to see.
How was the picnic? | Lovely, we were all so cheerful! | Bland, we left early.
What about the lecture? | Fascinating, I want to hear it again! | Dry, I stopped listening.
How do you find the new cafe? | Delightful, the cakes are superb! | Drab, the coffee tastes of nothing.
Was the hike to the lake nice? | It was magical, I was so excited! | It was dull, one tree after another.
How did the choir sound? | Splendid, it gave me goosebumps! | Lifeless, I counted the minutes.
What is the new teacher like? | Inspiring, everybody loves her! | Dreary, nobody pays attention.
How was the birthday party? | Great fun, we danced all night! | Boring, people just sat around.
How was the film? | Wonderful, I would watch it again right now! | Tedious, I would not watch it again.
Is the new job any good? | I love it, every day is exciting! | It is dull, every day is the same.
How was the market? | So lively, I had a fantastic time! | So dull, I walked through it and left.
What did you make of the match? | Thrilling, I was on my feet cheering! | Lifeless, I looked at my phone.
How did the holiday go? | It was a dream, I am still smiling! | It was uneventful, I was bored.
"""
_SETS = {"mood": _MOOD}


def example_pairs(name: str = "mood") -> list[tuple[str, str, str]]:
    """(prompt, positive_text, negative_text) triples of a set; SteeringError names the sets there are."""
    if name not in _SETS:
        raise SteeringError(f"{name!r}: there is no such set of example pairs; there are {', '.join(_SETS)}")
    rows = [line.split(" | ") for line in _SETS[name].strip().splitlines()]
    return [(prompt, positive, negative) for prompt, positive, negative in rows]
