"""Landmarks and where they stand: common knowledge, one landmark a country, for the `associative` task.

No word of a landmark is a word of any place, so that a question that names the place never repeats the needle.
"""

from __future__ import annotations

from typing import NamedTuple


class Landmark(NamedTuple):
    """A landmark, the city where it stands and the country."""

    landmark: str
    city: str
    country: str


LANDMARKS = [
    Landmark(*row.split(", "))
    for row in """\
the Eiffel Tower, Paris, France
the Colosseum, Rome, Italy
the Brandenburg Gate, Berlin, Germany
Big Ben, London, the United Kingdom
the Sagrada Familia, Barcelona, Spain
the Parthenon, Athens, Greece
the Little Mermaid statue, Copenhagen, Denmark
the Atomium, Brussels, Belgium
the Rijksmuseum, Amsterdam, the Netherlands
the Charles Bridge, Prague, the Czech Republic
the palace of Schönbrunn, Vienna, Austria
the Fisherman's Bastion, Budapest, Hungary
Wawel Castle, Krakow, Poland
Saint Basil's Cathedral, Moscow, Russia
the Pechersk Lavra, Kyiv, Ukraine
the Hagia Sophia, Istanbul, Turkey
Belém Tower, Lisbon, Portugal
the Ha'penny Bridge, Dublin, Ireland
the Vasa Museum, Stockholm, Sweden
the Vigeland sculpture park, Oslo, Norway
the Hallgrímskirkja, Reykjavik, Iceland
the sea fortress of Suomenlinna, Helsinki, Finland
the Chapel Bridge, Lucerne, Switzerland
Lovrijenac fortress, Dubrovnik, Croatia
Peleș Castle, Sinaia, Romania
Toompea Castle, Tallinn, Estonia
Gediminas' Tower, Vilnius, Lithuania
Devín Castle, Bratislava, Slovakia
Kalemegdan fortress, Belgrade, Serbia
the Sebilj fountain, Sarajevo, Bosnia and Herzegovina
Boyana Church, Sofia, Bulgaria
Skanderbeg Square, Tirana, Albania
Fort Saint Elmo, Valletta, Malta
the Great Sphinx, Giza, Egypt
the Koutoubia Mosque, Marrakesh, Morocco
Table Mountain, Cape Town, South Africa
the church of Bete Giyorgis, Lalibela, Ethiopia
Sankore Mosque, Timbuktu, Mali
the Mamelles lighthouse, Dakar, Senegal
Uhuru Gardens, Nairobi, Kenya
Black Star Square, Accra, Ghana
the Zaytuna Mosque, Tunis, Tunisia
the Treasury of Al-Khazneh, Petra, Jordan
the Umayyad Mosque, Damascus, Syria
the Raouche Rocks, Beirut, Lebanon
the Faisaliah Tower, Riyadh, Saudi Arabia
the Sultan Qaboos Grand Mosque, Muscat, Oman
the Burj Khalifa, Dubai, the United Arab Emirates
Azadi Tower, Tehran, Iran
the Flame Towers, Baku, Azerbaijan
the Matenadaran, Yerevan, Armenia
Narikala fortress, Tbilisi, Georgia
the Registan, Samarkand, Uzbekistan
Bayterek Tower, Astana, Kazakhstan
Gandan Monastery, Ulaanbaatar, Mongolia
Badshahi Mosque, Lahore, Pakistan
the Taj Mahal, Agra, India
Boudhanath Stupa, Kathmandu, Nepal
the Tiger's Nest, Paro, Bhutan
Lalbagh Fort, Dhaka, Bangladesh
the Temple of the Tooth, Kandy, Sri Lanka
Shwedagon Pagoda, Yangon, Myanmar
Wat Arun, Bangkok, Thailand
Angkor Wat, Siem Reap, Cambodia
Pha That Luang, Vientiane, Laos
Hoan Kiem Lake, Hanoi, Vietnam
the Petronas Towers, Kuala Lumpur, Malaysia
Istiqlal Mosque, Jakarta, Indonesia
Rizal Park, Manila, the Philippines
the Temple of Heaven, Beijing, China
the palace of Gyeongbokgung, Seoul, South Korea
the shrine of Fushimi Inari, Kyoto, Japan
Flinders Street Station, Melbourne, Australia
the Sky Tower, Auckland, New Zealand
the Statue of Liberty, New York, the United States
the CN Tower, Toronto, Canada
the Angel of Independence, Mexico City, Mexico
El Capitolio, Havana, Cuba
the arch of Santa Catalina, Antigua, Guatemala
the Miraflores Locks, Panama City, Panama
Monserrate hill, Bogotá, Colombia
the Basilica of the National Vow, Quito, Ecuador
the Coricancha, Cusco, Peru
La Moneda Palace, Santiago, Chile
the Casa Rosada, Buenos Aires, Argentina
the Palacio Salvo, Montevideo, Uruguay
Christ the Redeemer, Rio de Janeiro, Brazil
""".splitlines()
]
