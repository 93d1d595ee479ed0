"""What the invented encyclopedia says and asks, as data: kinds of entity, relations and their wordings (data/invented.py tells them).

Placeholders of a statement: {S} {s} subject, {o} object, {P} {p} possessive (capitals open the sentence), {a} the answer. Each has exactly
one mention of the entity, so that any statement can be the first of its passage. Placeholder of a question: {n}, the entity's name.
"""

from __future__ import annotations

from typing import NamedTuple


class Relation(NamedTuple):
    """What can be known of an entity: the kind of value, how passages state it, how training asks for it, and how only dev and test do."""

    value: str
    states: tuple[str, ...]
    asks: tuple[str, str, str]
    asks_held_out: tuple[str, str]


class Kind(NamedTuple):
    """A kind of entity: how many share nearly one name, the facts of each of its passages, and sentences that state no fact."""

    family: int
    sections: tuple[tuple[str, ...], ...]
    intros: tuple[str, ...]
    asides: tuple[str, ...]


KINDS = {
    "person": Kind(
        3, (("birth_date", "birthplace", "teacher"), ("trade", "device", "award"), ("spouse", "death_year", "death_place")),
        ("{S} has an entry in most older dictionaries of biography.", "{S} is still remembered in the province.",
         "Several portraits of {o} have survived.", "{P} letters have been printed more than once."),
        ("Friends described {o} as stubborn but kind.", "Much of this is known from {p} own letters.",
         "Contemporaries admired {p} patience.", "A street and a school bear {p} name.",
         "No complete list of {p} works exists.", "Few papers in {p} own hand survive.")),
    "town": Kind(
        3, (("river", "population", "town_founder"), ("charter", "elevation", "cheese")),
        ("{S} is a town of narrow streets and slate roofs.", "{S} is a small town.", "{S} is a quiet place in the hills.",
         "Travellers often pass through {o}."),
        ("Its market is held every second week.", "The old walls have mostly been pulled down.", "A railway came late and left early.",
         "The church tower leans a little to one side.")),
    "academy": Kind(
        2, (("opened", "seat", "mascot"), ("rector", "volumes", "newspaper")),
        ("{S} is a place of higher learning.", "{S} is known for strict examinations.", "{S} admits students from every province.",
         "Many judges and doctors were trained at {o}."),
        ("Lectures are free to the public on feast days.", "The main hall was rebuilt after a fire.", "Examinations are held twice a year.",
         "Its gardens slope down to the water.")),
    "novel": Kind(
        2, (("author", "protagonist", "published"), ("publisher", "translator")),
        ("{S} is a novel in three parts.", "{S} is a novel told mostly in letters.", "{S} is a long and rather sad novel.",
         "Critics were divided over {o}."),
        ("The plot turns on a lost inheritance.", "The second half takes place during a flood.", "A stage version ran for one winter.",
         "Readers have argued about the last chapter ever since.")),
    "company": Kind(
        2, (("company_founder", "staff", "established"), ("director", "product")),
        ("{S} is a family company.", "{S} is a firm with a long history.", "{S} is an old and cautious firm.",
         "Banks have rarely had reason to worry about {o}."),
        ("It has survived two fires and a bankruptcy.", "The accounts are kept by hand to this day.",
         "A small museum next to the main yard tells its story.", "Its wooden sign has become a local landmark.")),
    "ship": Kind(
        2, (("captain", "launched", "shipyard", "cargo"),),
        ("{S} was a trading ship.", "{S} was a slow but roomy ship.", "{S} was a merchant ship with two masts.",
         "Sailors told many stories about {o}."),
        ()),
    "painting": Kind(
        2, (("painter", "gallery", "finished"),),
        ("{S} is an oil painting on oak.", "{S} is a large painting in muted colours.", "{S} is a much copied painting.",
         "Restorers have twice cleaned the painting {o}."),
        ("A small dog is hidden in the lower left corner.", "The sky was painted over at least once.",
         "The frame is older than the picture.",
         "X-rays show a second figure under the paint.")),
    "plant": Kind(
        3, (("discoverer", "habitat", "described"),),
        ("{S} is a low plant with narrow leaves.", "{S} is a plant that flowers only at night.", "{S} is a rare and slow-growing plant.",
         "Gardeners seldom succeed in growing {o}."),
        ("Its seeds are carried by ants.", "The leaves smell faintly of pepper.", "Goats avoid it.", "It does not survive long in a pot.")),
}  # fmt: skip

CLOSING = ("death_year", "death_place")  # told last

RELATIONS = {
    "birth_date": Relation(
        "birth_date",
        ("{S} was born on {a}.", "The parish register gives {p} date of birth as {a}.",
         "{P} birth fell on {a}, during a hard frost.", "{S} came into the world on {a}."),
        ("When was {n} born?", "What is the date of birth of {n}?", "On what day did {n} come into the world?"),
        ("Which day, month and year mark the birth of {n}?", "What birth date is recorded for {n}?")),
    "birthplace": Relation(
        "town",
        ("{S} was a native of {a}.", "The house where {s} was born still stands in {a}.",
         "{S} was born in the town of {a}.", "{S} first saw the light of day in {a}."),
        ("Where was {n} born?", "In which town was {n} born?", "What is the birthplace of {n}?"),
        ("Which town can claim {n} as a native?", "What town did {n} originally come from?")),
    "teacher": Relation(
        "person",
        ("{S} learned to read from {a}.", "As a child {s} was taught by {a}.", "{P} first teacher was {a}.",
         "{S} spent six years as the pupil of {a}."),
        ("Who taught {n}?", "Who was the teacher of {n}?", "Whose pupil was {n}?"),
        ("Under whom did {n} study?", "Who gave lessons to the young {n}?")),
    "trade": Relation(
        "trade",
        ("{S} worked as a {a}.", "{S} earned a living as a {a}.", "By profession {s} was a {a}.", "{S} spent many years as a {a}."),
        ("What was the occupation of {n}?", "What did {n} do for a living?", "What was the profession of {n}?"),
        ("What kind of work did {n} do?", "As what was {n} employed?")),
    "device": Relation(
        "device",
        ("{S} invented the {a}.", "{P} best-known invention is the {a}.", "The {a}, a device still in use, was devised by {o}.",
         "The first working {a} was built by {o}."),
        ("What did {n} invent?", "What is the best-known invention of {n}?", "Which device was invented by {n}?"),
        ("What contraption do we owe to {n}?", "Which machine did {n} come up with?")),
    "award": Relation(
        "award",
        ("{S} was awarded the {a}.", "For a lifetime of work {s} received the {a}.", "{P} efforts were honoured with the {a}.",
         "The jury of the {a} chose {o} as winner."),
        ("Which prize did {n} win?", "What award was given to {n}?", "What honour did {n} receive?"),
        ("With which distinction was {n} decorated?", "What accolade went to {n}?")),
    "spouse": Relation(
        "person",
        ("{S} married {a}.", "{P} marriage to {a} was a happy one.", "After a long courtship {s} wed {a}.",
         "In a small ceremony {s} and {a} were married."),
        ("Who did {n} marry?", "Who was the spouse of {n}?", "To whom was {n} married?"),
        ("With whom did {n} tie the knot?", "Who was the partner in marriage of {n}?")),
    "death_year": Relation(
        "death_year",
        ("{S} died in {a}.", "{P} death came in {a}, after a short illness.", "{S} lived until {a}.",
         "{S} passed away in the spring of {a}."),
        ("In what year did {n} die?", "In which year did the death of {n} occur?", "What year saw the death of {n}?"),
        ("Which year was the last in the life of {n}?", "Until what year did {n} live?")),
    "death_place": Relation(
        "town",
        ("{S} died in the town of {a}.", "{S} spent a last summer in {a} and died there.", "Death found {o} in {a}.",
         "{P} life ended in {a}."),
        ("Where did {n} die?", "In which town did {n} die?", "What was the place of death of {n}?"),
        ("Where did the life of {n} come to an end?", "In what town did {n} pass away?")),
    "river": Relation(
        "river",
        ("{S} lies on the river {a}.", "The river {a} runs through {o}.", "{S} began as a ford over the {a}, a slow river.",
         "Boats reach {o} along the river {a}."),
        ("On which river does {n} lie?", "What river runs through {n}?", "Which river is {n} on?"),
        ("What is the name of the water that flows past {n}?", "By which waterway do boats reach {n}?")),
    "population": Relation(
        "thousands",
        ("{S} has {a} inhabitants.", "At the last census {p} population was {a}.", "{S} is home to {a} people.",
         "The census counted {a} residents in {o}."),
        ("How many people live in {n}?", "What is the population of {n}?", "How many inhabitants does {n} have?"),
        ("How many residents were counted in {n}?", "What number of people call {n} home?")),
    "elevation": Relation(
        "metres",
        ("{S} stands {a} above sea level.", "{P} elevation is {a}.", "At {a} above the sea, {s} often sees snow.",
         "A marker in {p} square gives a height of {a}."),
        ("What is the elevation of {n}?", "How high above sea level is {n}?", "At what height does {n} stand?"),
        ("How far above the sea is {n}?", "What altitude does {n} have?")),
    "town_founder": Relation(
        "person",
        ("{S} was founded by {a}.", "{a} built the first houses of {o}.", "Tradition names {a} as {p} founder.",
         "A statue of {a}, the founder, stands in the middle of {o}."),
        ("Who founded {n}?", "Who was the founder of {n}?", "By whom was {n} founded?"),
        ("Who established the settlement of {n}?", "To whom does {n} owe its existence?")),
    "charter": Relation(
        "year",
        ("{S} received its charter in {a}.", "A charter of {a} freed {o} from its lords.", "{P} municipal rights date from {a}.",
         "In {a}, {s} was granted the right to hold a market."),
        ("In what year did {n} receive its charter?", "When was {n} granted its rights?", "What is the year of the charter of {n}?"),
        ("Since which year has {n} been free of its lords?", "In which year did {n} gain the status of a market town?")),
    "cheese": Relation(
        "cheese",
        ("{S} is known for a cheese called {a}.", "{P} dairies make a cheese known as {a}.", "A sharp cheese named {a} comes from {o}.",
         "Visitors to {o} are offered {a}, a soft cheese."),
        ("Which cheese comes from {n}?", "What is the name of the cheese made in {n}?", "For which cheese is {n} known?"),
        ("What dairy speciality is {n} famous for?", "What do the dairies of {n} produce?")),
    "opened": Relation(
        "year",
        ("{S} opened its doors in {a}.", "{S} was established in {a}.", "The first lecture at {o} was given in {a}.",
         "{P} founding charter is dated {a}."),
        ("When was {n} founded?", "In what year did {n} open?", "What is the founding year of {n}?"),
        ("Since which year has {n} existed?", "In which year did teaching at {n} begin?")),
    "rector": Relation(
        "person",
        ("{P} first rector was {a}.", "{a} served as the first rector of {o}.", "{S} was first led by {a}.",
         "The first person to direct {o} was {a}."),
        ("Who was the first rector of {n}?", "Who first led {n}?", "Who directed {n} at the beginning?"),
        ("Who was the earliest head of {n}?", "Who was in charge of {n} when it began?")),
    "seat": Relation(
        "town",
        ("{S} is located in {a}.", "{P} buildings stand in {a}.", "{S} has its seat in {a}.", "Students of {o} find lodgings in {a}."),
        ("Where is {n} located?", "In which town is {n}?", "What town is home to {n}?"),
        ("To which town must a visitor to {n} travel?", "In what place can {n} be found?")),
    "volumes": Relation(
        "thousands",
        ("{P} library holds {a} books.", "There are {a} volumes in the library of {o}.", "{S} owns a library of {a} volumes.",
         "Readers at {o} can choose among {a} books."),
        ("How many books are in the library of {n}?", "How many volumes does the library of {n} hold?", "How large is the library of {n}?"),
        ("How many books does {n} own?", "What number of volumes stand on the shelves of {n}?")),
    "newspaper": Relation(
        "newspaper",
        ("{P} students publish the {a}.", "The {a} is the student newspaper of {o}.", "{S} has a student paper, the {a}.",
         "News of {o} appears every week in the {a}."),
        ("What is the student newspaper of {n}?", "Which newspaper do the students of {n} publish?",
         "What is the student paper of {n} called?"),
        ("In which periodical can one read news of {n}?", "What is the title of the weekly written by students of {n}?")),
    "mascot": Relation(
        "creature",
        ("{P} mascot is a {a}.", "{S} chose a {a} as its mascot.", "A {a} serves as the mascot of {o}.",
         "Teams from {o} wear the mascot, a {a}, on their shirts."),
        ("What is the mascot of {n}?", "Which animal is the mascot of {n}?", "What kind of mascot does {n} have?"),
        ("What creature represents {n}?", "What do the teams of {n} wear on their shirts?")),
    "author": Relation(
        "person",
        ("{S} was written by {a}.", "{a} is the author of {o}.", "{a} wrote {o} in a single winter.", "{S} is the only book by {a}."),
        ("Who wrote the novel {n}?", "Who is the author of {n}?", "By whom was {n} written?"),
        ("From whose pen comes the book {n}?", "Which writer created {n}?")),
    "publisher": Relation(
        "press",
        ("{S} was published by {a}.", "{P} publisher was {a}.", "The first edition of {o} was brought out by {a}.",
         "{a} printed the first copies of {o}."),
        ("Who published the novel {n}?", "What was the publisher of {n}?", "Which publisher brought out {n}?"),
        ("Which house first issued {n}?", "What company put {n} into print?")),
    "published": Relation(
        "year",
        ("{S} appeared in {a}.", "{S} was first sold in {a}.", "In {a}, {s} reached the bookshops.", "{P} first edition is dated {a}."),
        ("When was the novel {n} published?", "In what year did {n} appear?", "What is the year of publication of {n}?"),
        ("In which year could readers first buy {n}?", "What year did {n} come out?")),
    "protagonist": Relation(
        "person",
        ("{S} tells the story of {a}.", "{P} main character is {a}.", "{S} follows the travels of {a}.",
         "{a} is the central figure of {o}."),
        ("Who is the main character of the novel {n}?", "Whose story does {n} tell?", "Who is the protagonist of {n}?"),
        ("Whom does the book {n} follow?", "Who stands at the centre of {n}?")),
    "translator": Relation(
        "person",
        ("{S} was translated by {a}.", "{P} only translator so far is {a}.", "{a} translated {o} with great care.",
         "Abroad, {s} is read in a translation by {a}."),
        ("Who translated the novel {n}?", "Who is the translator of {n}?", "By whom was {n} translated?"),
        ("Who made {n} available in another language?", "Whose rendering of {n} is read abroad?")),
    "company_founder": Relation(
        "person",
        ("{S} was started by {a}.", "{P} founder was {a}.", "{a} founded {o} with borrowed money.", "{S} began in the kitchen of {a}."),
        ("Who founded {n}?", "Who was the founder of {n}?", "Who started the company {n}?"),
        ("Who set up the business {n}?", "In whose kitchen did {n} begin?")),
    "established": Relation(
        "year",
        ("{S} was set up in {a}.", "{S} has been in business since {a}.", "{P} first invoice is dated {a}.", "In {a}, {s} began to trade."),
        ("When was {n} founded?", "In what year was {n} set up?", "Since what year has {n} been in business?"),
        ("In which year did {n} start trading?", "To which year does the history of {n} go back?")),
    "product": Relation(
        "product",
        ("{S} makes {a}.", "{P} main product is {a}.", "{S} is best known for its {a}.", "The workshops of {o} turn out {a}."),
        ("What does {n} make?", "What is the main product of {n}?", "For what goods is {n} known?"),
        ("What could a customer buy from {n}?", "What is manufactured at {n}?")),
    "director": Relation(
        "person",
        ("{S} is run by {a}.", "{P} current director is {a}.", "{a} has managed {o} for many years.", "The head of {o} is {a}."),
        ("Who runs {n}?", "Who is the director of {n}?", "Who is the head of {n}?"),
        ("Who is the boss at {n}?", "Who manages the business of {n}?")),
    "staff": Relation(
        "thousands",
        ("{S} employs {a} people.", "{P} staff numbers {a}.", "There are {a} workers on the payroll of {o}.",
         "{S} provides work for {a} people."),
        ("How many people does {n} employ?", "How many employees does {n} have?", "What is the size of the staff of {n}?"),
        ("How many workers are on the payroll of {n}?", "For how many people does {n} provide jobs?")),
    "captain": Relation(
        "person",
        ("{S} sailed under Captain {a}.", "{P} captain was {a}.", "{a} commanded {o} on every voyage.", "The master of {o} was {a}."),
        ("Who was the captain of the ship {n}?", "Who commanded the {n}?", "Under which captain did the {n} sail?"),
        ("Who was in command aboard the {n}?", "Who gave the orders on the vessel {n}?")),
    "launched": Relation(
        "year",
        ("{S} was launched in {a}.", "In {a}, {s} first touched the water.", "{P} launch took place in {a}.",
         "Crowds watched the launch of {o} in {a}."),
        ("When was the ship {n} launched?", "In what year was the {n} launched?", "What is the launch year of the {n}?"),
        ("In which year did the vessel {n} first touch the water?", "What year did the {n} go to sea for the first time?")),
    "shipyard": Relation(
        "shipyard",
        ("{S} was built by the {a}.", "{P} builders were the {a}.", "The {a} laid the keel of {o}.",
         "{S} left the {a} over budget and late."),
        ("Which shipyard built the ship {n}?", "By which shipyard was the {n} built?", "Who were the builders of the {n}?"),
        ("At what yard was the vessel {n} constructed?", "Where was the keel of the {n} laid?")),
    "cargo": Relation(
        "food",
        ("{S} carried mostly {a}.", "{P} usual cargo was {a}.", "The hold of {o} was filled with {a}.", "Merchants loaded {o} with {a}."),
        ("What was the cargo of the ship {n}?", "What did the {n} carry?", "What goods were carried aboard the {n}?"),
        ("With what was the vessel {n} loaded?", "What could be found in the hold of the {n}?")),
    "painter": Relation(
        "person",
        ("{S} was painted by {a}.", "{a} painted {o} from memory.", "{P} painter is {a}.", "{S} is the work of {a}."),
        ("Who painted {n}?", "Who is the painter of {n}?", "By whom was {n} painted?"),
        ("Which artist created the picture {n}?", "Whose brush produced {n}?")),
    "gallery": Relation(
        "gallery",
        ("{S} hangs in the {a}.", "The {a} owns {o}.", "{P} home is the {a}.", "Visitors can see {o} at the {a}."),
        ("Where does the painting {n} hang?", "Which gallery owns {n}?", "In which museum can {n} be seen?"),
        ("What collection is the picture {n} part of?", "Where should one go to see {n}?")),
    "finished": Relation(
        "year",
        ("{S} was finished in {a}.", "{S} dates from {a}.", "{P} date, {a}, is written on the back.",
         "The last touches to {o} date from {a}."),
        ("When was the painting {n} finished?", "In what year was {n} painted?", "What is the date of the painting {n}?"),
        ("In which year was the picture {n} completed?", "What year is written on the back of {n}?")),
    "discoverer": Relation(
        "person",
        ("{S} was discovered by {a}.", "{P} discoverer was {a}.", "{a} was the first to collect {o}.", "The first to notice {o} was {a}."),
        ("Who discovered the {n}?", "Who was the discoverer of the {n}?", "By whom was the {n} discovered?"),
        ("Which botanist first came across the {n}?", "Who was the first to find the {n}?")),
    "habitat": Relation(
        "valley",
        ("{S} grows only in the {a}.", "{P} home is the {a}.", "Apart from the {a}, no place has {o}.", "{S} is native to the {a}."),
        ("Where does the {n} grow?", "What is the home of the {n}?", "In which place is the {n} found?"),
        ("Where must a botanist go to pick the {n}?", "To what region is the {n} confined?")),
    "described": Relation(
        "year",
        ("{S} was first described in {a}.", "Science has known {o} since {a}.", "{P} first description dates from {a}.",
         "In {a}, {s} received its Latin name."),
        ("When was the {n} first described?", "In what year was the {n} described?", "Since what year has the {n} been known to science?"),
        ("In which year did the {n} enter the scientific literature?", "What year was the {n} given a Latin name?")),
}  # fmt: skip
