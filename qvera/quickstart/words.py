"""The words and message templates of the quickstart task, one `Vocabulary` for each split.

The two share no template, no distractor and no value; tests/quickstart/test_task.py asserts it. A template names its facts
as `{name}`, `{street}`, `{city}`, `{count}`, `{colour}`, `{item}`, `{date}`, `{time}`. A part in square brackets is left
out where a fact in it is absent; brackets nest. `{gift}` and `{aside}` are whole sentences, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What one split is made of. No tuple shares an entry with the other split's."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    street_names: tuple[str, ...]
    street_types: tuple[str, ...]
    house_numbers: range
    cities: tuple[str, ...]
    counts: dict[int, str]
    """Each number with its word; a message has one or the other."""
    colours: tuple[str, ...]
    items: tuple[str, ...]
    """Always plural, so that the JSON has the words of the text."""
    months: tuple[str, ...]
    times: tuple[str, ...]
    gift: tuple[str, ...]
    no_gift: tuple[str, ...]
    """Sentences that speak of presents and mean that this is none; never beside one of `gift`."""
    asides: tuple[str, ...]
    """Distractors: other people, numbers, dates and places, which no field wants."""
    templates: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _listed(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(","))


TRAIN = Vocabulary(
    first_names=_words(
        "Alice Amir Anna Ben Bruno Carla Chloe Clara Daniel David Elena Emma Erik Fatima Felix Fiona George Grace Hana "
        "Harry Helen Ian Ines Jack James Jane Julia Karl Kate Laura Leo Liam Lucy Marco Maria Mark Martin Maya Nadia "
        "Nina Oliver Omar Paula Peter Priya Rachel Robert Rosa Sam Sara Simon Sofia Tara Thomas Victor Wendy Yusuf Zoe"
    ),
    last_names=_words(
        "Adams Ahmed Bailey Baker Barnes Bennett Brooks Carter Clark Cohen Collins Cooper Costa Davies Dixon Evans "
        "Fischer Foster Garcia Gibson Gray Green Hall Hansen Harris Hill Hughes Jackson Jensen Khan King Lopez Marsh "
        "Mason Miller Morgan Murphy Newton Novak Palmer Parker Patel Price Reed Rossi Scott Shaw Silva Stone Taylor "
        "Turner Walker Ward Watson Weber White Wilson Wood Wright Young"
    ),
    street_names=_words(
        "Abbey Alder Ash Bank Beech Bell Birch Bridge Brook Castle Cedar Chapel Cherry Church Cliff Cross Dale Duke East Elm "
        "Field Ford Forest Garden Grange Grove Harbour Hazel High Holly Iron Kiln Lake Lime Long Manor Maple Market "
        "Meadow Mill North Oak Park Pine Pond Queen River School Silver South Spring Station Victoria"
    ),
    street_types=_words("Road Street Lane Avenue Close"),
    house_numbers=range(1, 60),
    cities=_words(
        "Aberdeen Bath Birmingham Bolton Bradford Brighton Bristol Cambridge Cardiff Carlisle Chester Coventry Derby "
        "Dover Dundee Durham Edinburgh Exeter Glasgow Hull Ipswich Lancaster Leeds Lincoln Liverpool London Luton "
        "Manchester Newport Norwich Nottingham Oxford Perth Plymouth Preston Reading Sheffield Slough Stafford Swansea"
    ),
    counts={2: "two", 3: "three", 5: "five", 6: "six", 8: "eight", 10: "ten", 20: "twenty"},
    colours=_words("red blue green black white grey yellow golden ivory"),
    items=_listed(
        "chairs, tables, lamps, candles, blankets, pillows, plates, mugs, tea cups, wine glasses, towels, curtains, bowls, "
        "notebooks, pens, paper bags, backpacks, umbrellas, scarves, hats, socks, shirts, bath mats, buckets, brooms, "
        "flower pots, garden hoses, bicycles, helmets, tennis balls, kites, puzzles, toy cars, dolls, suitcases, mirrors, "
        "picture frames, clocks, shelves, boxes, desk fans, cushions, coat hangers, doormats"
    ),
    months=_words("January February March April May June July"),
    times=("7 am", "8 am", "9 am", "10 am", "1 pm", "2 pm", "3 pm", "noon"),
    gift=_lines(
        """It is a gift.
        They are a present.
        Please gift wrap them.
        It's for a birthday.
        This is a present for my sister.
        Wrap them nicely, it's a gift.
        They are a wedding gift.
        It's a surprise for my dad.
        Please add gift paper.
        I am giving them to a friend."""
    ),
    no_gift=_lines(
        """It is not a gift.
        No gift wrap, please.
        They are for myself.
        They are for our office."""
    ),
    asides=_lines(
        """The bell does not work.
        My neighbour Paul knows you.
        I paid by card.
        The dog is friendly.
        We live on floor 4.
        Last time it took 9 days.
        Thanks for your help.
        My sister in York has the same.
        I ordered in August too.
        Please bring the bill.
        Parking is free.
        I saw the 40 pounds offer.
        You were very kind last year.
        Leave nothing outside."""
    ),
    templates=_lines(
        """Hello, this is {name}. Please send {count} [{colour} ]{item} to {street}, {city}[ on {date}[ at {time}]]. {gift} {aside}
        Hi, I'd like {count} [{colour} ]{item}. {aside} My address is {street}, {city}.[ Please come on {date}[ by {time}].] {gift} {name}
        {gift} We need {count} {item}[ in {colour}] at {street} in {city}[ on {date}[, {time}]]. {aside} {name}
        Please deliver[ on {date}[ at {time}]] to {name}, {street}, {city}: {count} [{colour} ]{item}. {aside} {gift}
        Order from {name}: {count} {item}[, {colour}]. Address {street}, {city}. {aside}[ Date {date}[, time {time}].] {gift}
        Good morning. {aside} Can you bring {count} [{colour} ]{item}[ on {date}[ at {time}]]? I am {name}, {street}, {city}. {gift}
        Name: {name}. Address: {street}, {city}. Wanted: {count} [{colour} ]{item}. {gift}[ Day: {date}.[ Hour: {time}.]] {aside}
        {name} here. {aside} I am home[ on {date}[ from {time}]], so bring the {count} [{colour} ]{item} to {street}, {city}. {gift}
        Do you have {count} {item}[ in {colour}]? {gift} If so, deliver them to {name} at {street}, {city}[ on {date}[ at {time}]]. {aside}
        [On {date} ]I will be at {street}, {city}[ until {time}]. {gift} Please send {count} [{colour} ]{item}. {aside} Thanks, {name}
        Dear shop, {count} [{colour} ]{item} for {street}, {city}, please. {aside}[ {date}[ at {time}] would be best.] {gift} Yours, {name}
        Hello, {name} speaking. I need {count} [{colour} ]{item}. {gift} {street}, {city}, please. {aside}[ Best day: {date}[, best time: {time}].]
        {aside} {name} from {city} orders {count} [{colour} ]{item}. The street is {street}.[ I suggest {date}[ at {time}].] {gift}
        We agreed on {street}, {city}[ for {date}[, {time}]]. {aside} It is about {count} [{colour} ]{item}. {gift} {name}
        Sorry, I forgot the {item}[ in {colour}]. I need {count}. {gift} Send them to {street}, {city}[ on {date}[ at {time}]]. {aside} {name}
        Customer {name}, {street}, {city}, wants {count} [{colour} ]{item}[ on {date}[ at {time}]]. {aside} {gift}
        Hi there! {gift} Could I get {count} [{colour} ]{item}[ on {date}[ around {time}]]? {aside} I'm {name} and I live at {street}, {city}.
        To the shop: pack {count} [{colour} ]{item} and take them to {street}, {city}[ on {date}[ at {time}]]. {aside} Ask for {name}. {gift}
        From: {name}. {item}[ ({colour})], {count} of them. {aside} To {street}, {city}[ on {date}[ at {time}]]. {gift}
        My mother {name} lives at {street}, {city}. {aside} She ordered {count} [{colour} ]{item}[ for {date}[ at {time}]]. {gift}
        I am writing for {name}. The {count} [{colour} ]{item} go to {street} in {city}. {gift}[ {date}[, {time},] would be good.] {aside}
        {city}, {street}: {count} [{colour} ]{item}[, {date}[, {time}]]. {gift} Contact {name}. {aside}
        Good evening, I'm {name}. {aside} We ran out of [{colour} ]{item}, so we need {count}[ on {date}[ at {time}]]. {gift} Address is {street}, {city}.
        There are {count} [{colour} ]{item} missing in my order. {aside} Kindly send them to {street}, {city}[ on {date}[ at {time}]]. {gift} Thank you, {name}
        Please book[ {date}[, {time},]] for {name}, {street}, {city}. {gift} It's {count} [{colour} ]{item}. {aside}
        Hello from {city}! I want {count} {item}[, all {colour}]. {aside} {gift} The house is {street}. Come[ on {date}[ at {time}]] and ask for {name}.
        {name}, who lives at {street}, {city}, needs {count} [{colour} ]{item}. {gift}[ Delivery is on {date}[ after {time}].] {aside}
        Hey, it's {name}. Are you free[ on {date}[ at {time}]]? {aside} I want {count} [{colour} ]{item}. {gift} Same place: {street}, {city}."""
    ),
)

HELDOUT = Vocabulary(
    first_names=_words(
        "Adele Boris Cecilia Dominic Esther Farid Gloria Hugo Irene Jonas Keira Lars Mona Nathan Olga Pablo Quentin "
        "Ruth Stefan Tessa Ursula Vera Walter Xenia Yvonne Zack"
    ),
    last_names=_words(
        "Archer Bishop Chandler Doyle Ellis Fletcher Grant Holmes Ivanov Jordan Keller Lambert Moreno Nash Osborne "
        "Porter Quinn Rhodes Sutton Tucker Underwood Vaughan Winter Yates Zimmer"
    ),
    street_names=_words(
        "Acorn Badger Canal Drake Eagle Falcon Glebe Heron Ivy Juniper Kestrel Laurel Mulberry Nelson Orchard Poplar "
        "Quarry Raven Sycamore Thistle Union Violet Willow Yew"
    ),
    street_types=_words("Way Drive Terrace Crescent Place"),
    house_numbers=range(60, 120),
    cities=_words(
        "Belfast Canterbury Colchester Darlington Eastbourne Falmouth Gloucester Hereford Inverness Kettering Leicester "
        "Maidstone Northampton Oldham Peterborough Rochdale Salisbury Southampton Stirling Taunton Winchester Worcester"
    ),
    counts={4: "four", 7: "seven", 9: "nine", 12: "twelve", 30: "thirty"},
    colours=_words("purple orange pink brown violet beige"),
    items=_listed(
        "sofas, ladders, baskets, spoons, soup plates, rugs, jars, jugs, gloves, jackets, bath towels, stools, tents, "
        "sleeping bags, footballs, teddy bears, posters, vases, benches, toolboxes, sunglasses, pencils"
    ),
    months=_words("August September October November December"),
    times=("6 am", "11 am", "4 pm", "5 pm", "6 pm", "8 pm"),
    gift=_lines(
        """They are a gift for my mother.
        It's a birthday present.
        Please wrap it as a present.
        We want to surprise a friend.
        Gift paper, please."""
    ),
    no_gift=_lines(
        """This isn't a present.
        No wrapping paper needed.
        I'll use them myself."""
    ),
    asides=_lines(
        """My cousin Tim likes your shop.
        The lift holds 5 people.
        We moved here in 2021.
        The neighbours have a key.
        I have kept the receipt.
        The cat must stay inside.
        My old ones broke.
        Your site was down."""
    ),
    templates=_lines(
        """Good afternoon, I am {name} and I want to order {count} [{colour} ]{item}. {aside} I live at {street}, {city}.[ Would {date}[ at {time}] work?] {gift}
        {name}, {street}, {city}. {aside} {count} [{colour} ]{item}, please. {gift}[ I'd like them on {date}[ at {time}].]
        {gift} Someone should bring us {count} {item}[ in {colour}]. {aside}[ We are in on {date}[ after {time}].] The address: {street}, {city}. Signed, {name}
        New order[ for {date}[, {time}]]: {name}, {street}, {city}. {gift} The customer wants {count} [{colour} ]{item}. {aside}
        This message is from {name}. {aside} Please drop {count} [{colour} ]{item} at {street}, {city}[ on {date}[ at {time}]]. {gift}
        Our {count} [{colour} ]{item} should go to {city}. {gift} The place is {street}. {aside} {name} will be there[ on {date}[ at {time}]].
        I wonder if you sell {item}[ in {colour}]; I'd take {count}. {aside} My name is {name}, my home is {street}, {city}.[ {date}[ at {time}] is best.] {gift}
        Dear Sir or Madam,[ on {date}[ at {time}]] please visit {name} at {street}, {city}. {aside} Bring {count} [{colour} ]{item}. {gift}
        Items: {count} [{colour} ]{item}. {gift} Where: {street}, {city}.[ When: {date}[, {time}].] Who: {name}. {aside}
        Hello again, {name} of {street}, {city}. {gift} This time I need {count} [{colour} ]{item}. {aside} Could you come[ on {date}[ at {time}]]?
        Thanks for taking my call. {aside} As I said, it's {count} [{colour} ]{item} for {street}, {city}[ on {date}[ at {time}]]. {gift} {name}
        I'm short of [{colour} ]{item}, so I ask for {count}[ on {date}[ at {time}]]. {gift} {aside} Send to {name}, {street}, {city}."""
    ),
)
