"""The words that prompt pairs are filled with: common, mild, and mostly one token for English tokenizers."""

from __future__ import annotations

FEMALE = ("Mary", "Anna", "Emma", "Lucy", "Alice", "Sarah", "Laura", "Jane", "Kate", "Julia", "Lisa", "Susan", "Amy",
          "Linda", "Karen", "Helen")  # fmt: skip
MALE = ("John", "Tom", "James", "Paul", "David", "Peter", "Mark", "Daniel", "Robert", "Michael", "George", "Adam",
        "Kevin", "Simon", "Henry", "Frank")  # fmt: skip
PLACES = ("store", "park", "school", "library", "market", "beach", "office", "garden", "museum", "station")
THINGS = ("drink", "book", "ball", "letter", "ring", "map", "flower", "key", "ticket", "sandwich")
JOBS = ("doctor", "teacher", "cook", "driver", "writer", "singer", "farmer", "friend", "painter", "engineer")
EVENTS = ("war", "journey", "project", "siege", "voyage", "campaign", "dispute", "reign", "drought", "truce")

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "England": "London", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
    "Ireland": "Dublin", "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw",
    "Cuba": "Havana", "Canada": "Ottawa", "India": "Delhi", "Iran": "Tehran", "Iraq": "Baghdad", "Kenya": "Nairobi",
}  # fmt: skip

FACTS = {
    "People in {} mostly speak the language": {
        "France": "French", "Spain": "Spanish", "Italy": "Italian", "Germany": "German", "China": "Chinese",
        "Russia": "Russian", "Japan": "Japanese", "Portugal": "Portuguese", "England": "English", "Mexico": "Spanish",
        "Brazil": "Portuguese", "Austria": "German",
    },
    "The country of {} lies on the continent of": {
        "France": "Europe", "Spain": "Europe", "Italy": "Europe", "China": "Asia", "Japan": "Asia", "India": "Asia",
        "Egypt": "Africa", "Kenya": "Africa", "Nigeria": "Africa", "Germany": "Europe", "Vietnam": "Asia",
    },
    "The animal called a {} likes to eat": {
        "cow": "grass", "horse": "hay", "cat": "fish", "lion": "meat", "bird": "seeds", "frog": "insects",
    },
}  # fmt: skip

SEQUENCES = {
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
              "November", "December"),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
}  # fmt: skip

CONSONANT = ("pear", "book", "lamp", "table", "hat", "banana", "melon", "pen", "box", "cup", "chair", "ticket")
VOWEL = ("apple", "orange", "egg", "umbrella", "onion", "axe", "engine", "oven", "arrow", "album", "iron", "anchor")
WISHES = (
    "I want one {}. Can you pick up",
    "We still need one {}. Please bring us",
    "She lost her {} today. She has to buy",
    "He looked for one {}. At last he found",
)

SENTENCES = (
    "The ferry leaves the harbour at noon and comes back before the sun goes down over the hills.",
    "To bake good bread you need flour, water, salt, a little yeast and a great deal of patience.",
    "In the second half the visitors pressed hard, but the goalkeeper stopped every shot that came his way.",
    "Light from the nearest star takes more than four years to arrive at the telescope on the mountain.",
    "The committee will meet again on Tuesday to decide whether the old bridge should be repaired or replaced.",
    "She opened the window, listened to the rain for a while, and went back to her unfinished letter.",
    "A function that calls itself must have a case in which it stops, or it will never return.",
    "Most of the birds that nest on these cliffs spend the winter far away on the open sea.",
    "When prices rise faster than wages, people begin to buy less and to repair what they already own.",
    "The orchestra tuned for a long time before the conductor walked in and the hall became silent.",
    "Roots take up water from the soil and send it through the stem to every single leaf.",
    "They painted the kitchen yellow, hung the copper pans above the stove and invited all of the neighbours.",
)
