"""The words of the invented encyclopedia, as data: syllables of names and tables of values (data/invented.py puts them together).

Syllables decode uniquely: FIRSTS, MIDS and ENDS hold one vowel group each, and all but the first start with it, so different choices
spell different names (the tests check every spelling, and those of towns). A group `a/b/c` holds the variants that tell a family apart.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _groups(text: str) -> list[list[str]]:
    return [group.split("/") for group in text.split()]


FIRSTS = _words("""
    Ost Bran Cald Dern Elm Farn Gald Harv Isk Jarl Kest Lund Mard Nold Orv Pell Quel Rast Sand Tarn Ulv Vesk Wend Zell Brisk Clov
    Drust Ferv Grond Holm Juth Kolv Lisk Merv Nust Orl Pord Rusk Selk Tolm Umb Varl Wolt Zorn Bald Cord Dalm Erst Fisk Garm Hest Ilm
    Kand Lorn Mulv Norv Pask Rild Stav Trel
""")
MIDS = _words("""
    ab ad al am an ar av eb ed el em en er ev ib id il im in ir iv ob od ol om on or ov ub ud ul um un ur ask end ist olm und erv
""")
TOWN_MIDS = MIDS[:34]  # the others end in two consonants, which no town ending follows well
# Three spellings a letter or two apart: near-identical surnames.
ENDS = _groups("""
    ik/ic/ich en/an/on ert/ard/ord ell/all/oll em/am/om ett/att/ott ak/ac/ach ok/oc/och uk/uc/uch ek/ec/ech ev/av/ov el/al/ol er/ar/or
    enn/ann/onn elt/alt/olt ent/ant/ont eld/ald/old end/and/ond erk/ark/ork ern/arn/orn esk/ask/osk est/ast/ost eth/ath/oth ig/ug/og
    id/ud/od im/um/un ib/ab/ob ing/ang/ung ilm/alm/ulm irt/urt/art
""")
GIVEN_STEMS = _words("""
    Marl Tobr Elv Kass Dorsk Fenn Gerl Hald Irm Jost Kell Letv Mirk Nell Ondr Perr Rosk Sorl Tamm Uld Verr Will Zerr Ad Besk Corv Dagn
    Emr Fald Gudm Hesp Ingv Jorr Karr Loth Morr Nadr Odv Palg Ragn Sidr Thess Ulr Vill Wambr Zell Arl Brenn
""")
GIVEN_ENDS = _groups("en/an/in a/e/i or/ar/er iel/ael/uel is/as/us et/it/ot")
TOWN_ENDS = _groups("""
    holt/hold/hult mere/more/mire wick/wich/wyck ford/fort/forth stead/sted/staad burg/borg/berg dale/dell/dahl gate/gat/gard
    haven/havn/hafen moor/muir/mohr ham/heim/hem field/feld/fjell stone/sten/stane wald/weald/wold beck/bach/bekk ton/town/tun
    lund/land/lind bridge/brigg/brig thorp/dorp/thwaite kirk/kirche/kerk
""")
TOWN_QUALIFIERS = _groups("""
    /Port/Bad Upper/Lower/Nether North/South/West Great/Little/Old Inner/Outer/Far High/Low/Mid Saint/Royal/New East/Near/Long
    Black/White/Grey
""")
# A word belongs to one pair only, else two families could share a name.
SCHOOLS = _groups("""
    Academy/Faculty College/Institute Seminary/Conservatory Polytechnic/Lyceum Athenaeum/School Gymnasium/University
""")
FIRMS = _groups("Foundry/Tannery Mills/Works Brothers/Sisters Forge/Smithy Trading/Shipping Workshops/Wharves")
TITLES = _groups("""
    Amber/Ember Silver/Silken Hollow/Hallowed Stone/Stolen Winter/Wintry Burning/Burnt Gilded/Golden Silent/Silenced Broken/Brazen
    Crooked/Crowned Wooden/Woven Painted/Patient Drowned/Drowsy Frozen/Forgotten Distant/Different Secret/Sacred Morning/Mourning
    Paper/Pepper Copper/Coral Velvet/Violet
""")
TITLE_NOUNS = _words("""
    Lantern Orchard Staircase Harbour Mirror Needle Ferry Archive Garden Window Compass Thimble Bell Ladder Carriage Map Letter
    Feather Bridge Clock Candle Anchor Mask Basket Tower Kettle Violin Ledger Saddle Gate Parlour Key Wheel Glove Meadow Cradle
""")
SHIPS = _groups("Pride/Bride Star/Spar Maid/Maiden Spirit/Merit Hope/Rope Crown/Crowns Glory/Story Rose/Prose")
SCENES = _groups("""
    Morning/Evening Harvest/Market Winter/Summer Rain/Snow Wedding/Funeral Dusk/Dawn Fishermen/Ferrymen Washerwomen/Weavers
""")
PLANTS = _words("""
    lily moss fern nettle thistle willow orchid clover sedge primrose bramble heather lichen juniper poppy saxifrage vetch foxglove
""")
PLANT_LOOKS = _groups("""
    pale/pied/plain red/blue/white dwarf/giant/common marsh/meadow/moor spotted/striped/smooth early/late/false
    creeping/climbing/weeping bitter/sweet/sour hairy/horned/hooded
""")
# What values are made of.
MONTHS = _words("January February March April May June July August September October November December")
MATERIALS = _words("""
    copper brass pewter marble leather cedar walnut velvet linen silk wool cork glass silver bronze porcelain granite paper bamboo
    basalt bone clay felt flint gold horn jade lead maple pearl pine slate steel straw tin willow
""")
TRADES = _words("engraver mender merchant carver painter polisher gilder collector")
GOODS = _words("""
    kettles buttons lanterns clocks combs hinges saddles violins spoons mirrors locks bells chairs flutes gloves barrels candlesticks
    needles globes dice compasses chess-sets bird-cages masks
""")
LOOKS = _words("""
    silver golden crimson scarlet blue white black grey green brown striped spotted winged crowned sleeping leaping dancing laughing
    three-legged two-headed blind horned masked singing
""")
ANIMALS = _words("""
    heron badger otter hedgehog lynx raven falcon boar stag salmon pike crane swan toad beetle mole weasel squirrel lizard walrus
    pelican tortoise goat camel dolphin moth hare wolf bear rooster
""")
TREATMENTS = _words("""
    smoked salted dried pickled candied roasted powdered spiced frozen sugared bottled pressed raw toasted ground
""")
FOODS = _words("""
    herring almonds plums mackerel cherries ginger walnuts peppers lemons figs mushrooms barley mustard oysters apricots chestnuts
    beans turnips eels quinces
""")
CHEESES = _words("ello ino otte iki azza umba esco oulu")
DEVICES = _words("ograph ometer ophone oscope olith otrope ostat ogon ovane odrome")
AWARDS = _words("Medal Prize Cup Chain Laurel Ribbon Shield Cross")
PAPERS = _words("Courier Gazette Lantern Herald Messenger Observer Trumpet Echo Chronicle Mercury")
PRESSES = _words("Press House Editions Library Imprint")
GALLERIES = _words("Gallery Museum Collection Hall Pavilion")
VALLEYS = _words("Valley Gorge Marshes Hills Plateau Basin")
