"""The words that the problems are about: short, common and plain ASCII."""

WORDS = tuple(
    """
    apple bell bird boat book bread bridge cake castle chair cloud coat cow desk door
    drum eagle egg face farm fire fish flag forest frog garden gold grape hammer hat
    honey house ice island jacket key king lamp lemon lion map milk moon mouse needle
    night ocean onion owl paper piano queen rabbit river rose salt ship star table
    tiger violin whale winter zebra
    """.split()
)

NAMES = tuple(
    """
    Ada Ben Carla Dan Ella Finn Ivan Leo Maria Nina Omar Rosa Sam Tom
    """.split()
)

# Each can be bought, found, given away, lost and put in boxes (so no boxes here).
THINGS = tuple(
    """
    apples balls books cakes cards coins cups eggs hats lemons pens plates shells toys
    """.split()
)
