"""The words that the problems are about: short, common and plain ASCII."""

WORDS = tuple(
    """
    apple arrow autumn baker basket beach bell bird black blue boat bone book bottle
    box branch bread brick bridge brown bucket butter cabin cake camel candle car card
    carpet castle cat chair cheese cherry chicken circle city cloud coat coffee coin
    corn cotton cow cup dance deer desk dinner dog door dragon dream dress drum duck
    eagle earth egg engine face farm feather fence field finger fire fish flag floor
    flower forest fork fox friend frog fruit garden gate ghost glass goat gold grape
    grass green hammer hand hat heart hill honey horse house ice island jacket jar juice
    jungle key king kitchen kite knife ladder lake lamp leaf lemon letter light lion
    lizard lock map market mask meadow milk mirror money monkey moon morning mouse music
    nail needle nest night north nurse ocean olive onion orange owl paint paper parrot
    pear pencil pepper piano pillow planet plate pocket pond potato purple queen rabbit
    radio rain red rice ring river road robot rocket roof room root rope rose sail salt
    sand school seed shadow sheep ship shirt shoe silver sky snake snow soap sock south
    spider spoon spring square stone storm street sugar summer sun table tail tea tent
    tiger toast tomato tower toy train tree truck tulip turtle uncle valley village
    violin wagon wall water weather west whale wheat wheel white wind window winter wolf
    wood yard year yellow young zebra
    """.split()
)

NAMES = tuple(
    """
    Ada Amir Anna Ben Carla Chen Dan Ella Emma Eva Felix Finn Grace Hana Ivan Jack Jane
    Kai Lena Leo Lily Lucy Maria Max Mia Nina Noah Olga Omar Oscar Paul Pia Ravi Rosa
    Sam Sara Tara Tim Tom Yuki Zoe
    """.split()
)

# Each can be bought, found, given away, lost and put in boxes (so no boxes here).
THINGS = tuple(
    """
    apples balls beads books cakes candles cards coins cups eggs flags flowers
    grapes hats keys kites lemons marbles pears pencils pens plates plums shells socks
    spoons stamps stars stickers stones toys
    """.split()
)
