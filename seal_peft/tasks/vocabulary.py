"""Our own words: made-up cities and people, things to do, eat and own, and plain sentences to hide facts among.

Everything is composed from short lists, and the composed names are cut in two halves for training and testing. The
lists share no words, so that no name of one kind stands inside a name of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from random import Random

from .parts import half

# Each kind is every combination of one word of each part. None begins with a vowel: templates write "a" before them.
_KINDS: dict[str, tuple[str, ...]] = {
    # No city of these names is known, so that no answer can come from knowledge of the world.
    "city": (
        "Bram Cald Dorn Fenn Garr Hest Jorl Kell Lorn Mard Nest Pell Quor Rusk Sark Tarn Vell Wend Yarr Zell",
        "abury adale aford agrove ahaven amere aport astead awick avale oxley umouth",
    ),
    "person": (
        "Adela Bertram Cosima Dorian Edith Felix Greta Hubert Imogen Jasper Klara Leopold Matilda Nestor Odette "
        "Percival Quentin Rosalind Silvan Tabitha Ursula Viktor Wilma Xenia Yorick Zelda",
        "Applewhite Birdsong Crowther Drinkwater Fairweather Goodspeed Hathaway Lovejoy Merriman Nightshade Proudfoot "
        "Quickly Sheepshanks Thistlewood Underhill Wintersgill",
    ),
    "activity": (
        "paint carve polish collect repair photograph decorate sketch restore juggle",
        "wicker gilded lacquered knitted varnished folding",
        "canoes kites masks puppets sundials baskets birdhouses",
    ),
    "place": (
        "mossy crooked whitewashed red-brick thatched leaning vaulted marble sandstone half-timbered",
        "watermill lighthouse observatory greenhouse bathhouse windmill chapel granary boathouse belfry courthouse "
        "smithy",
    ),
    "dish": (
        "smoked pickled peppered caramelised spiced buttered roasted sugared minted salted",
        "pumpkin lentil quince trout chestnut parsnip rhubarb mussel",
        "stew dumplings tart pudding",
    ),
    "object": (
        "copper pewter velvet silver jade bronze leather walnut tin porcelain",
        "compass thimble kettle lantern snuffbox telescope music-box locket hourglass violin saddle chess-set",
    ),
    "animal": (
        "striped spotted long-eared short-tailed dappled hooded crested bearded snow-white pitch-black",
        "badger heron tortoise pelican weasel hedgehog camel magpie lynx walrus beaver falcon",
    ),
    "number": ("1 2 3 4 5 6 7 8 9", *["0 1 2 3 4 5 6 7 8 9"] * 4),
}
_WITHOUT_SPACES = ("city", "number")


@cache
def pool(kind: str, split: str) -> tuple[str, ...]:
    """All names of a kind that belong to a split.

    Args:
        kind: A key of the table above: `city`, `person`, `activity`, `place`, `dish`, `object`, `animal`, `number`.
        split: `"train"` or `"test"`.
    """
    space = "" if kind in _WITHOUT_SPACES else " "
    return half((space.join(words) for words in product(*(part.split() for part in _KINDS[kind]))), split)


class Deck:
    """Names drawn without repetition, kind by kind: what a context says of one thing is said of no other."""

    def __init__(self, rng: Random, split: str) -> None:
        self._rng, self._split = rng, split
        self._drawn: dict[str, set[str]] = {}

    def draw(self, kind: str) -> str:
        """Draw a name.

        Args:
            kind: As in `pool`.

        Raises:
            ValueError: If all names of this kind are used up.
        """
        names, drawn = pool(kind, self._split), self._drawn.setdefault(kind, set())
        if len(drawn) == len(names):
            raise ValueError(
                f"All {len(names)} names of the kind {kind!r} are used up: that many questions about one context were "
                "asked for. Use fewer."
            )
        name = self._rng.choice(names)
        while name in drawn:
            name = self._rng.choice(names)
        drawn.add(name)
        return name


_WHO = (
    "tired miller,young carpenter,cheerful gardener,retired captain,patient teacher,village postman,careful weaver,"
    "hungry goat,old ferryman,shy librarian,sleepy dog,busy cook,wandering minstrel,stubborn donkey,night watchman,"
    "brown hen,tall surveyor,honest grocer,quiet beekeeper,lucky fisherman,little boy,thirsty horse,curious fox,"
    "kind nurse,famous tailor,grey cat,careless student,proud rooster,clever locksmith,friendly neighbour"
).split(",")
_DOES = (
    "waits,rests,walks slowly,sings,looks at the clouds,stops for a while,counts the steps,watches the rain,"
    "thinks of nothing,sits down,talks to the wind,hums a tune,looks for some shade,turns around,falls asleep,"
    "listens to the birds,eats an apple,smiles,drops a spoon,remembers the summer"
).split(",")
_WHERE = (
    "beside the road,under the oak,behind the barn,by the stove,near the well,on the bench,along the river,"
    "at the gate,in the tall grass,before sunrise,after lunch,until the bell rings,on a cold morning,every other day,"
    "once again,without a hurry,while the soup is cooking,as the sun goes down,when the market closes,all day long"
).split(",")


def noise(rng: Random, split: str) -> Iterator[str]:
    """Plain sentences without end that say nothing anyone would ask about.

    Args:
        rng: Decides which.
        split: `"train"` or `"test"`; no sentence belongs to both.

    Returns:
        An endless iterator of sentences.
    """
    who = half(_WHO, split)
    while True:
        yield f"The {rng.choice(who)} {rng.choice(_DOES)} {rng.choice(_WHERE)}."
