"""List the words of the toy corpus: German forms with their English translations."""

# singular, plural, gender, English (with its plural where -s is wrong)
ANIMATES = """
Mann Männer m man/men; Frau Frauen f woman/women; Kind Kinder n child/children; Hund Hunde m dog; Katze Katzen f cat
Lehrer Lehrer m teacher; Mädchen Mädchen n girl; Vater Väter m father; Mutter Mütter f mother; Freund Freunde m friend
Schwester Schwestern f sister; Bruder Brüder m brother; Arzt Ärzte m doctor; Tochter Töchter f daughter
Sohn Söhne m son; Pferd Pferde n horse; Vogel Vögel m bird; König Könige m king; Königin Königinnen f queen
Koch Köche m cook; Gast Gäste m guest; Dieb Diebe m thief/thieves; Richter Richter m judge; Maler Maler m painter
Sängerin Sängerinnen f singer; Bäcker Bäcker m baker; Kuh Kühe f cow; Schaf Schafe n sheep/sheep
Fuchs Füchse m fox/foxes
Maus Mäuse f mouse/mice; Schlange Schlangen f snake; Enkel Enkel m grandson; Tante Tanten f aunt; Onkel Onkel m uncle
Schneider Schneider m tailor; Ärztin Ärztinnen f doctor; Ziege Ziegen f goat; Baby Babys n baby/babies
Gärtner Gärtner m gardener; Nichte Nichten f niece; Esel Esel m donkey; Ente Enten f duck; Hexe Hexen f witch/witches
"""
THINGS = """
Haus Häuser n house; Buch Bücher n book; Brief Briefe m letter; Apfel Äpfel m apple; Tisch Tische m table
Tasche Taschen f bag; Schlüssel Schlüssel m key; Uhr Uhren f clock; Bild Bilder n picture; Lampe Lampen f lamp
Stuhl Stühle m chair; Fenster Fenster n window; Schiff Schiffe n ship; Auto Autos n car; Fahrrad Fahrräder n bicycle
Ball Bälle m ball; Kleid Kleider n dress/dresses; Hut Hüte m hat; Schuh Schuhe m shoe; Koffer Koffer m suitcase
Flasche Flaschen f bottle; Glas Gläser n glass/glasses; Teller Teller m plate; Messer Messer n knife/knives
Gabel Gabeln f fork; Löffel Löffel m spoon; Kuchen Kuchen m cake; Ei Eier n egg; Zwiebel Zwiebeln f onion
Birne Birnen f pear; Baum Bäume m tree; Blume Blumen f flower; Stein Steine m stone; Ring Ringe m ring
Korb Körbe m basket; Karte Karten f map; Zeitung Zeitungen f newspaper; Kerze Kerzen f candle
Spiegel Spiegel m mirror
Decke Decken f blanket; Kissen Kissen n pillow; Hammer Hämmer m hammer; Nagel Nägel m nail; Seil Seile n rope
Eimer Eimer m bucket; Zelt Zelte n tent; Boot Boote n boat; Geige Geigen f violin; Trommel Trommeln f drum
Mantel Mäntel m coat; Brücke Brücken f bridge; Truhe Truhen f chest; Fass Fässer n barrel
Pinsel Pinsel m brush/brushes
"""
ADJECTIVES = """
groß big; klein small; alt old; jung young; neu new; schön beautiful; rot red; blau blue; grün green; schwarz black
weiß white; gut good; schlecht bad; schnell fast; langsam slow; schwer heavy; leicht light; müde tired; lustig funny
traurig sad; reich rich; arm poor; klug clever; seltsam strange; berühmt famous; ruhig quiet; wild wild; leer empty
"""
# infinitive (prefix|rest), he-form, participle, auxiliary, object, English base, he-form, past
# object: thing or person (accusative), to (dative person), a preposition with its case, none, or give (both cases)
VERBS = """
sehen sieht gesehen h person see sees saw; kaufen kauft gekauft h thing buy buys bought
finden findet gefunden h thing find finds found; suchen sucht gesucht h thing look_for looks_for looked_for
helfen hilft geholfen h to help helps helped; schlafen schläft geschlafen h none sleep sleeps slept
ab|holen holt abgeholt h person pick_up picks_up picked_up; besuchen besucht besucht h person visit visits visited
ein|laden lädt eingeladen h person invite invites invited; tragen trägt getragen h thing carry carries carried
an|rufen ruft angerufen h person call calls called; geben gibt gegeben h give give gives gave
verkaufen verkauft verkauft h thing sell sells sold
mit|bringen bringt mitgebracht h thing bring_along brings_along brought_along
warten wartet gewartet h auf+acc wait_for waits_for waited_for; danken dankt gedankt h to thank thanks thanked
malen malt gemalt h thing paint paints painted; hören hört gehört h person hear hears heard
an|kommen kommt angekommen s none arrive arrives arrived; folgen folgt gefolgt s to follow follows followed
zeigen zeigt gezeigt h give show shows showed; verlieren verliert verloren h thing lose loses lost
auf|heben hebt aufgehoben h thing lift lifts lifted; sprechen spricht gesprochen h mit+dat talk_to talks_to talked_to
lachen lacht gelacht h none laugh laughs laughed; reparieren repariert repariert h thing repair repairs repaired
zu|hören hört zugehört h to listen_to listens_to listened_to; lieben liebt geliebt h person love loves loved
weg|werfen wirft weggeworfen h thing throw_away throws_away threw_away
treffen trifft getroffen h person meet meets met
schicken schickt geschickt h give send sends sent; auf|stehen steht aufgestanden s none get_up gets_up got_up
vergessen vergisst vergessen h thing forget forgets forgot
denken denkt gedacht h an+acc think_of thinks_of thought_of
an|schauen schaut angeschaut h thing look_at looks_at looked_at; arbeiten arbeitet gearbeitet h none work works worked
stehlen stiehlt gestohlen h thing steal steals stole
ein|schlafen schläft eingeschlafen s none fall_asleep falls_asleep fell_asleep
retten rettet gerettet h person rescue rescues rescued; verstecken versteckt versteckt h thing hide hides hid
tanzen tanzt getanzt h mit+dat dance_with dances_with danced_with
vertrauen vertraut vertraut h to trust trusts trusted
zurück|geben gibt zurückgegeben h thing give_back gives_back gave_back; weinen weint geweint h none cry cries cried
leihen leiht geliehen h give lend lends lent; weg|laufen läuft weggelaufen s none run_away runs_away ran_away
bestellen bestellt bestellt h thing order orders ordered; fangen fängt gefangen h person catch catches caught
antworten antwortet geantwortet h to answer answers answered; ein|packen packt eingepackt h thing pack packs packed
auf|wecken weckt aufgeweckt h person wake_up wakes_up woke_up
zurück|kommen kommt zurückgekommen s none come_back comes_back came_back
aus|leihen leiht ausgeliehen h thing borrow borrows borrowed; zeichnen zeichnet gezeichnet h thing draw draws drew
"""
MODALS = """
kann können can can; will wollen want_to wants_to; muss müssen must must; soll sollen should should
darf dürfen may may
"""
TIMES = """
heute today any; jetzt now present; gestern yesterday past; morgen tomorrow present; am_Abend in_the_evening any
jeden_Tag every_day any; am_Montag on_Monday any; am_Freitag on_Friday any; im_Winter in_winter any
nachts at_night any
vor_N_Tagen N_days_ago past; um_N_Uhr at_N_o'clock any; in_N_Wochen in_N_weeks present; vor_N_Jahren N_years_ago past
"""
PLACES = """
im_Garten in_the_garden; in_der_Küche in_the_kitchen; auf_dem_Markt at_the_market; am_Fluss by_the_river
im_Wald in_the_forest; hinter_der_Kirche behind_the_church; vor_der_Schule in_front_of_the_school
neben_dem_Bahnhof next_to_the_station; im_Dorf in_the_village; auf_dem_Dach on_the_roof; im_Keller in_the_cellar
"""
CONJUNCTIONS = "weil because; wenn when; obwohl although; bevor before; während while"
GIVEN_NAMES = "Anna Jonas Klara Emil Greta Oskar Mira Felix Nora Anton Ida Ruben Selma Kilian Tilda Veit Romy Lorenz"
SURNAMES = "Keller Brandt Vogt Sommer Lindner Ackermann Reuter Thoma Berger Hartwig Osterloh Pfister Quandt Wiesner"

UNITS = "zwei two;drei three;vier four;fünf five;sechs six;sieben seven;acht eight;neun nine"
TEENS = (
    "zehn ten;elf eleven;zwölf twelve;dreizehn thirteen;vierzehn fourteen;fünfzehn fifteen;sechzehn sixteen;"
    "siebzehn seventeen;achtzehn eighteen;neunzehn nineteen"
)
TENS = (
    "zwanzig twenty;dreißig thirty;vierzig forty;fünfzig fifty;sechzig sixty;siebzig seventy;achtzig eighty;"
    "neunzig ninety"
)

DEFINITE = {
    "nom": {"m": "der", "f": "die", "n": "das", "pl": "die"},
    "acc": {"m": "den", "f": "die", "n": "das", "pl": "die"},
    "dat": {"m": "dem", "f": "der", "n": "dem", "pl": "den"},
}
EIN_ENDINGS = {  # of ein, kein, mein, ...
    "nom": {"m": "", "f": "e", "n": "", "pl": "e"},
    "acc": {"m": "en", "f": "e", "n": "", "pl": "e"},
    "dat": {"m": "em", "f": "er", "n": "em", "pl": "en"},
}
POSSESSIVES = {"mein": "my", "dein": "your", "sein": "his", "unser": "our"}
PRONOUNS = (  # nominative, accusative, dative, English subject and object, person
    ("er", "ihn", "ihm", "he", "him", "he"),
    ("sie", "sie", "ihr", "she", "her", "he"),
    ("ich", "mich", "mir", "I", "me", "I"),
    ("wir", "uns", "uns", "we", "us", "they"),
    ("sie", "sie", "ihnen", "they", "them", "they"),
)
