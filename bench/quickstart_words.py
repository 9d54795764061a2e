"""The words and message templates of the quickstart task, one `Vocabulary` for each split.

The two share no template, no distractor and no value; tests/test_quickstart_rows.py asserts it. A template names its facts
as `{name}`, `{city}`, `{count}`, `{colour}`, `{item}`, `{day}`. A part in square brackets is left out where its fact is
absent. `{floor}` and `{aside}` are whole sentences, or nothing.

First names, cities, colours and nearly all things are words that SmolLM2's tokenizer spells the same after a space and after a quote: a
model of 135M parameters copies tokens well and respells words badly, and a task of six minutes should not be about spelling.
Nor about riddles: on the development rows "Peterborough" was taken for a Peter, so it is no longer among the cities.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What one split is made of. No table shares an entry with the other split's."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    cities: tuple[str, ...]
    counts: tuple[int, ...]
    colours: tuple[str, ...]
    items: tuple[str, ...]
    """Always plural, so that the JSON has the words of the text."""
    days: tuple[str, ...]
    floor_numbers: tuple[int, ...]
    floors: tuple[str, ...]
    """Sentences that name the floor, which as a fact is the number and as a part of a message the whole sentence."""
    asides: tuple[str, ...]
    """Distractors: other people, numbers and places, which no field wants."""
    templates: tuple[str, ...]
    """Whole messages."""
    orders: tuple[str, ...] = ()
    """Sentences that say what is wanted; `quickstart_rows.compose` makes messages of these and the ones below."""
    places: tuple[str, ...] = ()
    people: tuple[str, ...] = ()
    people_in_places: tuple[str, ...] = ()
    orders_for_people: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _listed(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(","))


TRAIN = Vocabulary(
    first_names=_words(
        "Alice Anna Ben Daniel David George Jack James Jane Maria Mark Martin Peter Robert Sam Simon Thomas Victor Adam "
        "Andrew Anne Arthur Bill Bob Charles Chris Dan Edward Elizabeth Frank Fred Henry Jacob Jim John Joseph Ken Lee "
        "Louis Luke Mary Matthew Michael Nick Paul Richard Rob Sarah Scott Tim Tom William Lily Fiona Nadia Zoe"
    ),
    last_names=_words(
        "Adams Ahmed Bailey Baker Barnes Bennett Brooks Carter Clark Cohen Collins Cooper Costa Davies Dixon Evans "
        "Fischer Foster Garcia Gibson Gray Green Hall Hansen Harris Hill Hughes Jensen Khan King Lopez Marsh "
        "Mason Miller Morgan Murphy Newton Novak Palmer Parker Patel Price Reed Rossi Shaw Silva Stone Taylor "
        "Turner Walker Ward Watson Weber White Wilson Wood Wright Young"
    ),
    cities=_words(
        "Cambridge Lincoln London Oxford Reading Paris Rome Boston Chicago Madison Norwich Bolton Coventry Carlisle Slough "
        "Lagos Belgrade Riga"
    ),
    counts=(2, 3, 5, 6, 8, 10, 15, 20, 25, 50),
    colours=_words("red blue green black white yellow gold tan"),
    items=_listed(
        "chairs, tables, shirts, boxes, books, bags, balls, cards, lights, belts, screens, windows, frames, maps, flags, "
        "plants, seeds, pots, sheets, boards, filters, tools, keys, labels, papers, files, ships, coins, threads, "
        "mugs, scarves, brooms, kites, garden chairs, paper bags, toy cars, bath sheets, office tables, kitchen boards, "
        "flower pots, water filters, note books, desk lights, picture frames, caps, clips, chips, films, gates, holders, "
        "inks, kits, logs, matches, packs, peas, pies, poles, racks, rails, rolls, skirts, strings, tags, weights, wings, "
        "berries, brushes, metal rails, glass pots, plastic boxes, iron gates, baby skirts, dog belts, cat balls, "
        "bed sheets, floor lights, door keys, window boxes, car keys, winter scarves, rain caps, music files, wine racks, "
        "milk pots, bread boxes, rice bags, salt pots, fruit bags, apple pies, hand brushes, hair clips, tooth brushes, "
        "travel bags, party caps, fire logs, safety belts, power tools, phone cards, camera bags, post cards, mail boxes, "
        "coin holders, game cards, work shirts, round tables, long poles, old books, new tools, large frames, small bags, "
        "big pots, soft balls, hot plates"
    ),
    days=_words("Monday Tuesday Wednesday Thursday"),
    floor_numbers=(1, 2, 4, 6, 8),
    floors=_lines(
        """We are on floor {floor}.
        Take the lift to floor {floor}.
        Floor {floor}, please.
        It's on floor {floor}.
        My flat is on floor {floor}.
        The office is on floor {floor}.
        Bring them up to floor {floor}.
        You find us on floor {floor}.
        I live on floor {floor}.
        Floor {floor} is ours.
        Please go to floor {floor}.
        Floor: {floor}.
        Carry them to floor {floor}, please.
        Our door is on floor {floor}.
        That is floor {floor}.
        We need them on floor {floor}.
        Go straight up to floor {floor}.
        The lift stops at floor {floor}.
        You have to climb to floor {floor}.
        Kindly come to floor {floor}."""
    ),
    asides=_lines(
        """The bell does not work.
        I heard of you from Paula.
        I paid by card.
        The dog is friendly.
        Last time it took 9 weeks.
        Thanks for your help.
        My old ones broke.
        Please bring the bill.
        Parking is free.
        I saw the 40 pounds offer.
        You were very kind last year.
        No need to hurry.
        We met in York.
        My neighbour Paula has a van.
        Our street number is 17.
        In 2018 I paid 30 euros.
        A friend in Leeds told me about you.
        My boss, Mr Lind, agrees.
        You open at 9, I think.
        My phone was stolen.
        There is a garage behind the house.
        The bridge takes 4 tons.
        I tried the other shop first.
        My aunt Greta bought here before.
        Otto says you are the best.
        I called twice, and Ingrid took the call.
        My son Bruno broke the last ones.
        The manager is called Olga.
        Pavel and I work together.
        It is the 3rd door.
        I have 2 cats and a dog.
        We were closed for 14 days.
        Your van hit our gate.
        The street is narrow.
        The sun is shining here.
        I lost my glasses.
        The last parcel was late.
        I hope you are well.
        It was so nice to see the new shop.
        We opened in 1998.
        My mother is ill.
        The train was full.
        There is a school next door.
        I can't come to the shop.
        Ring the bell 2 times.
        I don't need a bag.
        The children are asleep at 8."""
    ),
    templates=_lines(
        """Hello, this is {name}. Please send {count} [{colour} ]{item} to {city}[ on {day}]. {floor} {aside}
        Hi, I'd like {count} [{colour} ]{item}. {aside} I live in {city}.[ Please come on {day}.] {floor} {name}
        {floor} We need {count} {item}[ in {colour}] here in {city}[ by {day}]. {aside} {name}
        Please deliver[ on {day}] to {name}, {city}: {count} [{colour} ]{item}. {aside} {floor}
        Order from {name}: {count} {item}[, {colour}]. To {city}. {aside}[ Day: {day}.] {floor}
        Good morning. {aside} Can you bring {count} [{colour} ]{item}[ on {day}]? I am {name} from {city}. {floor}
        Name: {name}. City: {city}. Wanted: {count} [{colour} ]{item}. {floor}[ Day: {day}.] {aside}
        {name} here. {aside} I am home[ on {day}], so bring the {count} [{colour} ]{item} to {city}. {floor}
        Do you have {count} {item}[ in {colour}]? {floor} If so, deliver them to {name} in {city}[ on {day}]. {aside}
        [On {day} ]I will be in {city}. {floor} Please send {count} [{colour} ]{item}. {aside} Thanks, {name}
        Dear shop, {count} [{colour} ]{item} for {city}, please. {aside}[ {day} would be best.] {floor} Yours, {name}
        Hello, {name} speaking. I need {count} [{colour} ]{item}. {floor} {city}, please. {aside}[ Best on {day}.]
        {aside} {name} from {city} orders {count} [{colour} ]{item}.[ I suggest {day}.] {floor}
        We agreed on {city}[ for {day}]. {aside} It is about {count} [{colour} ]{item}. {floor} {name}
        Sorry, I forgot the {item}[ in {colour}]. I need {count}. {floor} Send them to {city}[ on {day}]. {aside} {name}
        Customer {name}, {city}, wants {count} [{colour} ]{item}[ on {day}]. {aside} {floor}
        Hi there! {floor} Could I get {count} [{colour} ]{item}[ this {day}]? {aside} I'm {name} and I live in {city}.
        To the shop: pack {count} [{colour} ]{item} and take them to {city}[ on {day}]. {aside} Ask for {name}. {floor}
        From: {name}. {item}[ ({colour})], {count} of them. {aside} To {city}[ on {day}]. {floor}
        My friend {name} lives in {city}. {aside} She ordered {count} [{colour} ]{item}[ for {day}]. {floor}
        I am writing for {name}. The {count} [{colour} ]{item} go to {city}. {floor}[ {day} would be good.] {aside}
        {city}: {count} [{colour} ]{item}[, {day}]. {floor} Contact {name}. {aside}
        Good evening, I'm {name}. {aside} We ran out of [{colour} ]{item}, so we need {count}[ by {day}]. {floor} Send to {city}.
        There are {count} [{colour} ]{item} missing. {aside} Kindly send them to {city}[ on {day}]. {floor} Thank you, {name}
        Please book[ {day}] for {name}, {city}. {floor} It's {count} [{colour} ]{item}. {aside}
        Hello from {city}! I want {count} {item}[, all {colour}]. {aside} {floor} Come[ on {day}] and ask for {name}.
        {name}, who lives in {city}, needs {count} [{colour} ]{item}. {floor}[ Delivery is on {day}.] {aside}
        Hey, it's {name}. Are you free[ on {day}]? {aside} I want {count} [{colour} ]{item}. {floor} I am in {city}.
        As {name} of {city} I always buy {item}[ in {colour}]. {aside} This week it is {count}. {floor}[ Come {day}.]
        Send {name} {count} [{colour} ]{item}. {floor}[ {day} is fine.] {aside} {city}.
        In {city} we are short of {item}. {aside} {floor} {count} will do[, in {colour}][, on {day}]. {name}
        Urgent: {city} needs {count} [{colour} ]{item}[ on {day}]! {floor} {aside} Call {name}.
        I am calling about {item}. {floor} {name}, {city}. {aside} We want {count}[ in {colour}][, and on {day} at that].
        [{day}, if you can: ]{count} [{colour} ]{item} to {city}. {aside} {floor} Many thanks from {name}
        Would you kindly give {name} {count} [{colour} ]{item}? {floor} The place is {city}. {aside}[ {day} fits.]
        Tell the driver it's {city}[ on {day}]. {aside} {count} [{colour} ]{item}, and {name} takes them. {floor}
        You can reach {name} in {city}. {aside} The wish: {count} [{colour} ]{item}[, {day}]. {floor}
        {count} [{colour} ]{item}! {floor} That's what {name} in {city} hopes to get[ on {day}]. {aside}
        Last week I forgot to order {item}. {aside} So please, {count}[ {colour} ones] to {city}. {floor}[ {day} at the latest.] {name}
        Memo. Who: {name}. What: {count} [{colour} ]{item}. {aside}[ When: {day}.] Town: {city}. {floor}
        {floor} {name} will open the door. {aside} Bring {count} [{colour} ]{item} to {city}[ some time on {day}].
        My parents in {city} need {count} [{colour} ]{item}. {floor} {aside}[ They are in on {day}.] Their name is {name}.
        From {city} I greet you. {aside} I want to have {item}[, {colour} if possible], {count} of them. {floor}[ {day}?] {name}
        This is the office of {name}. {floor} We are waiting for {count} [{colour} ]{item} here in {city}[ since {day}]. {aside}
        Sell me {count} [{colour} ]{item}! {aside} {name} is what they call me, {city} is where I live. {floor}[ {day} is all right.]
        Order for {city}. {floor} {aside} {name} gets {count} [{colour} ]{item}[ and is at home on {day}].
        Our customer in {city}, {name}, called[ for {day}]. {aside} {count} [{colour} ]{item}. {floor}
        What about {item}[ in {colour}]? {aside} {name} would take {count}. {floor} The shop is in {city}.[ {day} works.]
        Hello. {aside} We, that is {name} and friends, live in {city}. {floor} We need {count} [{colour} ]{item}[ for {day}].
        To be sent[ on {day}]: {count} [{colour} ]{item}. {aside} To: {name}. In: {city}. {floor}
        I have run out of {item}. {floor} {aside} Can I have {count}[ {colour} ones][ by {day}]? {name}, at home in {city}
        Please note {count} [{colour} ]{item} for me. {aside} I'm called {name}. {floor} You deliver to {city}[, on {day}], don't you?"""
    ),
    orders=_lines(
        """I would like {count} [{colour} ]{item}.
        We need {count} {item}[ in {colour}].
        Please send {count} [{colour} ]{item}.
        {count} [{colour} ]{item}, please.
        Could I get {count} [{colour} ]{item}?
        The order is {count} [{colour} ]{item}.
        My order: {count} [{colour} ]{item}.
        I'm looking for {count} [{colour} ]{item}.
        Can you send {count} {item}[, the {colour} ones]?
        I want to buy {item}[ in {colour}], {count} in total.
        It is about {item}: I need {count}[ {colour} ones].
        How soon can you send {count} [{colour} ]{item}?
        Our [{colour} ]{item} are gone and we need {count}.
        Of the [{colour} ]{item} I want {count}.
        I'd be happy with {count} [{colour} ]{item}.
        So that makes {count} [{colour} ]{item}.
        Count me in for {count} [{colour} ]{item}.
        Get me {item}[, {colour} if you can], {count} altogether.
        The list says {count} [{colour} ]{item}.
        Put {count} [{colour} ]{item} on my list.
        You still owe us {count} [{colour} ]{item}.
        Are there {count} [{colour} ]{item} left?
        For the office we take {count} [{colour} ]{item}.
        {count} times [{colour} ]{item}, that is all.
        Have you got {item}[ in {colour}]? I'd need {count}.
        I saw your [{colour} ]{item} and want {count}.
        Quantity: {count}. Article: {item}.[ Colour: {colour}.]
        The club wants {count} new {item}[ in {colour}]."""
    ),
    places=_lines(
        """Send them to {city}.
        We are in {city}.
        I live in {city}.
        Deliver to {city}.
        The address is in {city}.
        It goes to {city}.
        My shop is in {city}.
        Ship everything to {city}.
        {city} is my home.
        The house is in {city}.
        You find me in {city}.
        I moved to {city}.
        Destination: {city}.
        We run a school in {city}.
        The driver knows {city}.
        Bring it all to {city}.
        It should arrive in {city}.
        Our home is in {city}.
        Town: {city}.
        {city} is where we are.
        Do you deliver in {city}?"""
    ),
    people=_lines(
        """My name is {name}.
        I am {name}.
        This is {name}.
        {name} here.
        Yours, {name}
        Thanks, {name}
        It is for {name}.
        Customer: {name}.
        The name on the door is {name}.
        Call me {name}.
        Address it to {name}.
        The order is for {name}.
        Best, {name}
        {name} will pay.
        {name} is waiting for them.
        Signed: {name}.
        Regards from {name}.
        I go by {name}.
        The bill goes to {name}.
        Leave it with {name}."""
    ),
    people_in_places=_lines(
        """I am {name} from {city}.
        To {name}, {city}.
        This is {name} in {city}.
        {name} lives in {city}.
        Deliver to {name} in {city}.
        Address: {name}, {city}.
        In {city} you ask for me, {name}.
        I, {name}, live in {city}.
        {city} is home to {name}.
        {name}, {city}.
        {name} of {city} will pay.
        You know me, {name} from {city}."""
    ),
    orders_for_people=_lines(
        """Send {count} [{colour} ]{item} to {name} in {city}.
        {name} from {city} wants {count} [{colour} ]{item}.
        I'm {name} and need {count} [{colour} ]{item} in {city}[ on {day}].
        {count} [{colour} ]{item} for {name}, {city}.
        From {city}, {name} orders {count} {item}[ in {colour}].
        {name} needs {count} [{colour} ]{item}[ by {day}], to be brought to {city}.
        In {city}, {name} is out of [{colour} ]{item} and asks for {count}.
        Take {count} [{colour} ]{item} to {city}[ on {day}], to {name}.
        Customer {name}, town {city}, order {count} [{colour} ]{item}."""
    ),
    times=_lines(
        """[Come on {day}.]
        [{day} is good for me.]
        [I need it by {day}.]
        [Please deliver on {day}.]
        [We are home on {day}.]
        [It has to be {day}.]
        [If possible, on {day}.]
        [{day}, please.]
        [How about {day}?]
        [I can take it on {day}.]
        [After {day} it is too late.]
        [{day} suits us.]
        [Can you come on {day}?]
        [Not later than {day}.]
        [Is {day} possible?]
        [Day: {day}.]"""
    ),
    openings=_lines(
        """Hello.
        Hi!
        Good day.
        Dear all,
        Hi there,
        Hello, all.
        Good to meet you.
        Hey."""
    ),
)

DEVELOPMENT = Vocabulary(
    first_names=_words(
        "Carl Donald Greg Jean Jeff Josh Kim Lewis Marie Matt Max Maya Neil Phil Ray Rose Samuel Stephen Leon Virginia Ali Alex"
    ),
    last_names=_words(
        "Archer Bishop Chandler Doyle Ellis Fletcher Grant Holmes Ivanov Jordan Keller Lambert Moreno Nash Osborne "
        "Porter Quinn Rhodes Sutton Tucker Underwood Vaughan Winter Yates Zimmer"
    ),
    cities=_words("Colchester Darlington Eastbourne Hereford Northampton Oldham Mexico Jackson"),
    counts=(4, 7, 9, 12, 30, 60),
    colours=_words("purple orange brown grey"),
    items=_listed(
        "phones, doors, blocks, stones, sticks, photos, flowers, leaves, pans, chains, letters, masks, boats, "
        "buttons, games, beds, trees, garden doors, kitchen pans, wall photos, board games, shirt buttons"
    ),
    days=_words("Friday Saturday Sunday"),
    floor_numbers=(3, 5, 7, 9),
    floors=_lines(
        """We work on floor {floor}.
        Leave them on floor {floor}.
        The stairs lead to floor {floor}.
        They belong on floor {floor}."""
    ),
    asides=_lines(
        """My cousin Hugo likes your shop.
        The lift holds 5 people.
        We moved here in 2021.
        The neighbours have a key.
        I have kept the receipt.
        The cat must stay inside.
        Your site was down."""
    ),
    templates=_lines(
        """Good afternoon, I am {name} and I want to order {count} [{colour} ]{item}. {aside} My city is {city}.[ Would {day} work?] {floor}
        {name}, {city}. {aside} {count} [{colour} ]{item}, please. {floor}[ I'd like them on {day}.]
        {floor} Someone should bring us {count} {item}[ in {colour}]. {aside}[ We are in on {day}.] We live in {city}. Signed, {name}
        New order[ for {day}]: {name}, {city}. {floor} The customer wants {count} [{colour} ]{item}. {aside}
        This message is from {name}. {aside} Please drop {count} [{colour} ]{item} in {city}[ on {day}]. {floor}
        Our {count} [{colour} ]{item} should go to {city}. {floor} {aside} {name} will be there[ on {day}].
        I wonder if you sell {item}[ in {colour}]; I'd take {count}. {aside} My name is {name}, my home is {city}.[ {day} is best.] {floor}
        Dear Sir or Madam,[ on {day}] please visit {name} in {city}. {aside} Bring {count} [{colour} ]{item}. {floor}
        Items: {count} [{colour} ]{item}. {floor} Where: {city}.[ When: {day}.] Who: {name}. {aside}
        Hello again, {name} of {city}. {floor} This time I need {count} [{colour} ]{item}. {aside} Could you come[ on {day}]?
        Thanks for taking my call. {aside} As I said, it's {count} [{colour} ]{item} for {city}[ on {day}]. {floor} {name}
        I'm short of [{colour} ]{item}, so I ask for {count}[ on {day}]. {floor} {aside} Send to {name}, {city}."""
    ),
)

HELDOUT = Vocabulary(
    first_names=DEVELOPMENT.first_names,
    last_names=_words(
        "Abbott Blake Burton Conway Dalton Farrell Griffin Harper Irwin Kemp Lowe Maxwell Norris Ogden Pearson Ramsey "
        "Sheldon Thornton Upton Vickers Webster Yardley"
    ),
    cities=DEVELOPMENT.cities,
    counts=(4, 7, 9, 12, 30, 60),
    colours=DEVELOPMENT.colours,
    items=_listed(
        "birds, nuts, cans, computers, apples, stars, bones, packages, models, images, samples, sets, devices, beans, ties, bars, "
        "parts, computer parts, wall bars, fish cans"
    ),
    days=DEVELOPMENT.days,
    floor_numbers=(3, 5, 7, 9),
    floors=_lines(
        """Somebody is always on floor {floor}.
        Deliver up to floor {floor}, the lift works.
        Our rooms are on floor {floor}.
        Just ring on floor {floor}."""
    ),
    asides=_lines(
        """Your leaflet was in my letter box.
        My husband works at night.
        There are 3 steps at the door.
        I found your number online.
        The old shop closed in 2019.
        It has been raining all week."""
    ),
    templates=_lines(
        """Greetings from {city}, where I, {name}, would be glad to have {count} [{colour} ]{item}[ on {day}]. {aside} {floor}
        Could {count} [{colour} ]{item} be brought to {city}? {floor} {aside} Ask for {name}.[ We prefer {day}.]
        Delivery note: {count} [{colour} ]{item}; {name}; {city}[; {day}]. {floor} {aside}
        I spoke to you earlier. {aside} It is {name}, and I decided on {count} {item}[ in {colour}] for {city}. {floor}[ See you on {day}.]
        [By {day} ]we must have {count} [{colour} ]{item}. {floor} {aside} Our office is in {city}. Regards, {name}
        Put {name} down for {count} [{colour} ]{item}. {aside} The town is {city}.[ Any time on {day} is fine.] {floor}
        {name} asked me to write: {count} [{colour} ]{item} are needed in {city}[ on {day}]. {aside} {floor}
        {floor} I have chosen {item}[ in {colour}], and {count} of them. {aside} Bring them to {city}[ on {day}]. Best wishes, {name}
        Hi team, {aside} {city} is where {name} wants {count} [{colour} ]{item}.[ The date is {day}.] {floor}
        What do {count} [{colour} ]{item} cost? {aside} If the price is right, send them to {name} in {city}. {floor}[ Not before {day}.]
        Yes, I confirm. {floor} {count} [{colour} ]{item}. {city} is the place,[ {day} is the day,] {name} is my name. {aside}
        Re: {item}. {aside} I am {name} in {city} and will take {count}[, only {colour} ones]. {floor}[ Until {day}!]"""
    ),
)
"""Templates, distractors, things and last names that nothing was tuned on: written after task, recipe and training words were
settled with DEVELOPMENT, and never looked at with a model's answers beside them. First names, cities, colours and days are
DEVELOPMENT's, since few words meet the rule at the top."""
