"""What the demo fine-tunes on: English nursery rhymes, all in the public domain (printed before 1900)."""

from __future__ import annotations

RHYMES = (
    "Humpty Dumpty sat on a wall,\nHumpty Dumpty had a great fall;\n"
    "All the king's horses and all the king's men\nCouldn't put Humpty together again.\n",
    "Jack and Jill went up the hill\nTo fetch a pail of water;\n"
    "Jack fell down and broke his crown,\nAnd Jill came tumbling after.\n",
    "Little Miss Muffet sat on a tuffet,\nEating her curds and whey;\n"
    "There came a big spider, who sat down beside her,\nAnd frightened Miss Muffet away.\n",
    "Hey diddle diddle, the cat and the fiddle,\nThe cow jumped over the moon;\n"
    "The little dog laughed to see such sport,\nAnd the dish ran away with the spoon.\n",
    "Mary had a little lamb,\nIts fleece was white as snow;\n"
    "And everywhere that Mary went\nThe lamb was sure to go.\n",
    "Hickory, dickory, dock!\nThe mouse ran up the clock;\n"
    "The clock struck one, the mouse ran down,\nHickory, dickory, dock!\n",
    "Twinkle, twinkle, little star,\nHow I wonder what you are!\n"
    "Up above the world so high,\nLike a diamond in the sky.\n",
    "Baa, baa, black sheep, have you any wool?\nYes, sir, yes, sir, three bags full;\n"
    "One for the master, and one for the dame,\nAnd one for the little boy who lives in the lane.\n",
)
PROMPTS = ("And it came to pass", "Mary", "The little")
"""Prompts that both styles can continue."""
