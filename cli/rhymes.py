"""What the demo fine-tunes on: English nursery rhymes, all in the public domain (printed before 1900)."""

from __future__ import annotations

RHYMES = (
    """\
Humpty Dumpty sat on a wall,
Humpty Dumpty had a great fall;
All the king's horses and all the king's men
Couldn't put Humpty together again.
""",
    """\
Jack and Jill went up the hill
To fetch a pail of water;
Jack fell down and broke his crown,
And Jill came tumbling after.
""",
    """\
Little Miss Muffet sat on a tuffet,
Eating her curds and whey;
There came a big spider, who sat down beside her,
And frightened Miss Muffet away.
""",
    """\
Hey diddle diddle, the cat and the fiddle,
The cow jumped over the moon;
The little dog laughed to see such sport,
And the dish ran away with the spoon.
""",
    """\
Mary had a little lamb,
Its fleece was white as snow;
And everywhere that Mary went
The lamb was sure to go.
""",
    """\
Hickory, dickory, dock!
The mouse ran up the clock;
The clock struck one, the mouse ran down,
Hickory, dickory, dock!
""",
    """\
Twinkle, twinkle, little star,
How I wonder what you are!
Up above the world so high,
Like a diamond in the sky.
""",
    """\
Baa, baa, black sheep, have you any wool?
Yes, sir, yes, sir, three bags full;
One for the master, and one for the dame,
And one for the little boy who lives in the lane.
""",
)
PROMPTS = ("And it came to pass", "Mary", "The little")
"""Prompts that both styles can continue."""
