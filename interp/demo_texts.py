"""The demo's reading matter: twelve short paragraphs in four registers, written for it."""

from __future__ import annotations

PARAGRAPHS: dict[str, list[str]] = {
    "law": [
        "The tenant shall return the premises at the end of the term in the condition in which they were received, "
        "ordinary wear excepted. If the landlord finds damage beyond such wear, the cost of repair may be deducted "
        "from the deposit, provided that an itemised statement is delivered to the tenant within thirty days.",
        "A contract made under a mistake that both parties share, and that concerns a fact on which the agreement "
        "rests, may be set aside at the request of either. The court will ask whether the party seeking relief bore "
        "the risk of that mistake, and whether the other has already acted in reliance on the bargain.",
        "Notice under this section is valid only if it is given in writing and names the obligation said to be "
        "breached. The party in breach then has fourteen days to perform. Silence is not consent, and a delay in "
        "enforcing a right does not by itself waive it.",
    ],
    "code": [
        "def moving_average(values, width):\n    total = 0.0\n    window = []\n    for value in values:\n"
        "        window.append(value)\n        total += value\n        if len(window) > width:\n"
        "            total -= window.pop(0)\n        yield total / len(window)\n",
        "for (let row = 0; row < grid.length; row++) {\n  for (let col = 0; col < grid[row].length; col++) {\n"
        "    if (grid[row][col] === null) {\n      continue;\n    }\n    counts[grid[row][col]] += 1;\n  }\n}\n",
        "SELECT author, COUNT(*) AS books\nFROM library\nWHERE year >= 1990 AND language = 'en'\nGROUP BY author\n"
        "HAVING COUNT(*) > 3\nORDER BY books DESC, author ASC\nLIMIT 20;\n",
    ],
    "kitchen": [
        "Rub the butter into the flour with your fingertips until it looks like coarse sand, then stir in the sugar "
        "and a pinch of salt. Add just enough cold water to bring the dough together. Wrap it and let it rest in the "
        "refrigerator for half an hour before you roll it out.",
        "Soften the onions slowly in olive oil; they should turn golden and sweet, never brown. Add the chopped "
        "tomatoes, a bay leaf and a little of the stock, and simmer until the sauce coats the back of a spoon. Taste "
        "it before you add more salt.",
        "To poach a pear, keep the syrup below a boil. Slip in the peeled fruit with a strip of lemon peel and half a "
        "cinnamon stick, cover with a circle of paper, and wait until a knife meets no resistance. Let it cool in its "
        "own liquid overnight.",
    ],
    "sky": [
        "On a clear night in August the Milky Way rises almost straight up from the southern horizon. Let your eyes "
        "adapt to the dark for twenty minutes, then look for the dark lanes that divide it: they are clouds of dust "
        "that hide the stars behind them.",
        "Jupiter's four large moons change places from one evening to the next. A steady pair of binoculars shows "
        "them as points of light in a line. Galileo drew them night after night in 1610, and saw that they circle "
        "the planet and not the Earth.",
        "A total eclipse of the Moon lasts for hours and can be seen from half of the world. Sunlight that is bent by "
        "our atmosphere still reaches the Moon and colours it copper; after a great volcanic eruption it can almost "
        "vanish from sight.",
    ],
}
