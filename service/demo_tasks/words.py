"""Words of the demo's tasks. {item} and {city} are filled from the lists, {date} from the date forms."""

ITEMS = (
    "kettle", "lamp", "bicycle", "camera", "tent", "blender", "printer", "armchair", "heater", "violin",
    "keyboard", "backpack", "drill", "mirror", "freezer", "radio", "scooter", "toaster", "clock", "fan",
)  # fmt: skip

CITIES = ("Lisbon", "Oslo", "Dublin", "Turin", "Vienna", "Krakow", "Porto", "Bergen", "Lyon", "Ghent")

GREETINGS = ("", "Hello,", "Hi there,", "Good morning,", "Dear team,", "Quick question:")

CLOSINGS = ("", "Thanks.", "Please advise.", "Please help.", "I am waiting.", "What now?")

DEPARTMENTS = {
    "billing": (
        "I was charged twice for the {item}.",
        "the invoice for my {item} shows the wrong amount.",
        "my card was debited but I cancelled the {item}.",
        "I still wait for the refund of the {item}.",
        "the discount is missing on the bill for the {item}.",
        "can I pay for the {item} in two instalments?",
        "I need a receipt with tax for the {item}.",
        "you took 40 euros too much for the {item}.",
    ),
    "shipping": (
        "the parcel with the {item} has not arrived in {city}.",
        "the courier left my {item} at the wrong house.",
        "where is the {item} that you sent to {city}?",
        "tracking says the {item} is stuck in {city}.",
        "can you deliver the {item} to {city} instead?",
        "the driver never rang, and the {item} went back.",
        "how long does delivery of a {item} to {city} take?",
        "the box with the {item} came a week late.",
    ),
    "repairs": (
        "the {item} broke after two days of use.",
        "my {item} does not switch on any more.",
        "a part of the {item} fell off.",
        "the {item} makes a loud noise and then stops.",
        "the {item} is cracked and needs a new cover.",
        "can a technician in {city} look at my {item}?",
        "the motor of the {item} smells burnt.",
        "I need a spare screw for the {item}.",
    ),
    "accounts": (
        "I forgot the password of my profile.",
        "my login from {city} is blocked.",
        "please change the email address of my profile.",
        "I cannot sign in since I moved to {city}.",
        "how do I delete my user profile in {city}?",
        "the code for signing in never reaches my phone in {city}.",
        "my user name shows the old surname, I now live in {city}.",
        "somebody in {city} logged in with my password.",
    ),
    "careers": (
        "do you hire drivers in {city}?",
        "I sent my application for the job in {city}.",
        "is there an internship at your {city} office?",
        "when is my interview in {city}?",
        "I would like to work in your {city} shop.",
        "what salary does the post in {city} offer?",
        "is the vacancy for a clerk in {city} still open?",
        "where do I send my CV for {city}?",
    ),
}

OPINIONS = (
    "The {item}",
    "My new {item}",
    "This {item}",
    "The {item} from {city}",
    "Our second {item}",
    "The {item} I bought",
)

PRAISE = (
    "works perfectly",
    "looks beautiful",
    "is easy to use",
    "feels solid",
    "runs quietly",
    "was worth every cent",
    "saves me hours",
    "makes my family happy",
    "beats every other one",
    "arrived in a lovely box",
)

BLAME = (
    "fails every morning",
    "looks cheap",
    "is a pain to clean",
    "feels flimsy",
    "smells awful",
    "was a waste of money",
    "drives me crazy",
    "disappoints my family",
    "stopped within an hour",
    "scratches at once",
)

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

DATE_FORMS = ("{day} {month}", "{month} {day}", "the {ordinal} of {month}", "{month} {ordinal}")

PLANS = (
    "please bring the {item} on {date}.",
    "I collect the {item} in {city} on {date}.",
    "we meet in {city} on {date}.",
    "I am away until {date}.",
    "the {item} must be ready by {date}.",
    "our move to {city} is on {date}.",
    "the sale in {city} ends on {date}.",
    "I ordered the {item} on {date}.",
    "the visit in {city} was on {date}.",
    "my warranty for the {item} ends on {date}.",
)
