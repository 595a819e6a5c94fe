"""The words that the problems are about: short, common and plain ASCII."""

WORDS = tuple(
    """
    apple baker bell bird boat book bread bridge cake camel castle chair circle
    cloud coat coin cow cup desk dog door dragon drum duck eagle egg face farm fence
    field fire fish flag forest fox frog garden gate glass gold grape green hammer
    hat heart hill honey horse house ice island jacket juice key king kite knife
    lake lamp lemon letter lion lock map market milk mirror money moon mouse nail
    needle night north ocean olive onion orange owl paint paper pear piano plate
    pond queen rabbit radio rain ring river road robot rope rose salt sand school
    ship silver snake snow soap spoon star stone storm sugar sun table tent tiger
    tower train tree turtle valley violin wagon water whale wheel window winter wolf
    wood yard zebra
    """.split()
)

NAMES = tuple(
    """
    Ada Amir Anna Ben Carla Dan Ella Finn Grace Ivan Jane Leo Lucy Maria Nina Omar
    Paul Rosa Sam Tom
    """.split()
)

# Each can be bought, found, given away, lost and put in boxes (so no boxes here).
THINGS = tuple(
    """
    apples balls books cakes cards coins cups eggs flags hats kites lemons marbles
    pears pens plates shells stamps stickers toys
    """.split()
)
