"""Words that keys of needles are made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter bright calm clever copper crimson curious damp distant early eager faded fierce "
    "frosty gentle golden hasty hidden hollow humble icy idle jolly keen lively lonely lucky misty modest "
    "narrow noble odd pale patient plain proud quick quiet rapid rough rusty scarlet shiny silent silver "
    "simple sleepy slow smooth solid spare steady stern stormy swift tall tender tidy timid tiny vast "
    "velvet warm weary wild windy wise woolly young zealous"
)

NOUNS = _words(
    "acorn anchor apron arrow badge barrel basket beacon bell blanket bottle branch bridge bucket button "
    "cabin candle canyon carpet castle chapel cliff cloud compass corner cradle crane creek desert drum "
    "engine falcon feather fiddle forest fountain garden glacier hammer harbor island jacket kettle "
    "ladder lantern magnet meadow mirror mountain needle oyster paddle pebble pepper pillow planet quarry "
    "ribbon river saddle shovel signal spider table temple thunder tunnel valley violin wagon walnut "
    "window"
)
