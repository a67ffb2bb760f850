"""Everyday entities and their attributes, for a game of twenty questions."""

from __future__ import annotations

ATTRIBUTES = {
    "a": "Is it an animal?",
    "b": "Is it a mammal?",
    "c": "Can it fly?",
    "d": "Is it wet, or at home in water?",
    "e": "Does it have four legs?",
    "f": "Is it kept on farms or as a pet?",
    "g": "Does it eat meat?",
    "h": "Is it bigger than a person?",
    "i": "Does it fit into one hand?",
    "j": "Do people eat it?",
    "k": "Is it a plant or a part of one?",
    "l": "Is it sweet?",
    "m": "Is it mostly metal?",
    "n": "Is it mostly wood?",
    "o": "Does it run on electricity?",
    "p": "Does it have wheels?",
    "q": "Is it worn?",
    "r": "Is it known for the sound it makes?",
    "s": "Is it found in a kitchen?",
    "t": "Is it found outdoors?",
    "u": "Is it round?",
    "v": "Is it sharp or does it sting or bite?",
    "w": "Is it soft?",
    "x": "Has it been known for a thousand years?",
}

# A line is a kind: what is true of all of it, then each entity with what is true of it besides. No two are alike.
_TABLE = """
abetx: dog/fgrvw cat/fgivw horse/fh cow/fhj pig/fj sheep/fjw donkey/fhr rabbit/fijw mouse/i rat/fi squirrel/iw
abetx: lion/ghrv tiger/ghv wolf/grv fox/gvw deer/j elephant/hr giraffe/h zebra/hj hippo/dhv rhino/hv
abetx: beaver/dv otter/dgvw moose/hjd hedgehog/giv badger/gv llama/fhw hamster/fiw ferret/fgv
abtx: bat/cgi monkey/r whale/dhr dolphin/dg seal/dghw gorilla/h walrus/dghv
actx: eagle/gv owl/gr sparrow/i swan/dh parrot/fr hawk/giv robin/ir gull/dg stork/g bee/firv wasp/iv
actx: butterfly/iw mosquito/irv moth/iwg duck/dfj goose/dfjhr turkey/fjr beetle/iu
atx: chicken/fjr penguin/dg ostrich/hf snake/gv cobra/ghv lizard/egi crocodile/deghv turtle/de frog/degir toad/ei
atx: ant/i spider/giv scorpion/givr snail/ijw worm/iw crab/dijv lobster/djv shark/dghv salmon/dgj tuna/dghj trout/dgi
atx: eel/dgjw jellyfish/dgvw oyster/dij shrimp/dijw starfish/di goldfish/dfi carp/dfj newt/degi
jklstx: apple/iu pear/i plum/iuw cherry/iur grape/iuwv fig/iw melon/u berry/iuv
jkstx: carrot/i onion/iu potato/iw cabbage/u corn/l cucumber/w leek/v
jksx: rice/i bread/w pepper/iv walnut/iu cinnamon/il tea/lw
jlsx: honey/w cake/uw pie/u syrup/d sugar/i
jsx: cheese/w butter/iw milk/d egg/iu salt/i soup/dw pancake/uw
jls: chocolate/i candy/iu icecream/w donut/iuw cola/d
js: pizza/u burger/iuw crisps/i ketchup/w
ktx: oak/hn pine/hnv rose/ivw tulip/iw grass/w cactus/v willow/hnw daisy/iuw
ktx: reed/d lily/idw seaweed/djw thistle/iv
msx: knife/iv spoon/i pan/u kettle/r
s: plate/ux cup/iux bottle/i napkin/iwx sponge/iw apron/qwx jar/iu tray/x
os: fridge/hm oven/m blender/mrv dishwasher/hmd mixer/mr
o: lamp/u tv/r radio/ri laptop/i computer/m fan/rv vacuum/pr drill/rvm clock/rux
o: torch/it battery/im robot/mp shaver/iv
mtx: sword/v axe/vn anchor/dhv chain bell/r needle/iv hammer/in key/i coin/iu ring/iuq
mtx: plough/hv armor/q helmet/qu
pt: car/hmr bus/hmor bike/m scooter/mo cart/nx wagon/hnx tractor/hmfr pram/w skates/vqm
pt: firetruck/hmrd motorbike/hmv caravan/h skateboard/n plane/chmr glider/ch
t: ship/dhm boat/dhnx canoe/dnx raft ferry/dhmr submarine/dhmo helicopter/chmrv rocket/chmv balloon/cuw kite/cw
t: drone/cmo
qwx: hat/t shirt sock/i shoe/it crown/mu
qw: trousers tie/i raincoat/dt swimsuit/di
nx: table/e bed/ehw door/h ladder/th bench/te stool/eu cradle/w barrel/tu chest cupboard/hs bookcase/he
nx: pen/i
rx: drum/u flute/in harp/hnv violin/n trumpet/m lute/nu horn whistle/im organ/hm gong/mu
r: piano/hn saxophone/m accordion siren/om tuba/mh banjo/nu
tx: house/h church/hr mill/hnr well/du tent/w river/dh sea/dhr mountain/hv
tx: cloud/chw rain/d ice/dsv sun/huc star/c fire/v stone/i volcano/hur wind/r
tx: net/dw swing/nw ball/uw
iwx: pillow/u towel/d candle brush/n feather/ck wool/f paper/k
i: pencil/nv eraser/w stamp glasses/qx watch/qmo dice/u comb/vx button/quw zip/qm magnet/m
wx: blanket curtain/h rug/u
"""


def _read() -> list[dict[str, frozenset[str]]]:
    kinds = []
    for line in _TABLE.strip().splitlines():
        common, entities = line.split(": ")
        entries = (entry.partition("/") for entry in entities.split())
        kinds.append({name: frozenset(common + attributes) for name, _, attributes in entries})
    return kinds


KINDS = _read()
ENTITIES = {name: attributes for kind in KINDS for name, attributes in kind.items()}
